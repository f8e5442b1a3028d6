# A test double: it takes any key, and forgets all when it ends.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
RUN python -m venv /opt/moto && /opt/moto/bin/pip install moto[s3,server]
COPY s3_server.py wget /usr/local/bin/
ENTRYPOINT ["/opt/moto/bin/python", "/usr/local/bin/s3_server.py"]
