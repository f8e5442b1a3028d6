# An S3 server that keeps objects as plain files in a volume.
FROM versity/versitygw:v1.8.0
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
CMD ["--port", ":7070", "--health", "/health", "posix", "/data"]
