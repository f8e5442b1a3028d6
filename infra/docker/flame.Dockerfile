# The worker, the orchestrator and the command in one image; the command line says which one it is.
#
# Functions of a program travel as byte code, so programs and workers need the same minor version of Python:
#     docker build --file infra/docker/flame.Dockerfile --build-arg PYTHON_VERSION=3.11 --tag flame .
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
# Where pip looks, for those who have a mirror.
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/flame
WORKDIR /source
# What changes seldom comes first: a change of Flame's code installs no dependency again.
COPY requirements/base.txt requirements/
RUN /opt/flame/bin/pip install --requirement requirements/base.txt
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY worker worker
COPY client client
COPY infra/flame_infra infra/flame_infra
RUN /opt/flame/bin/pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/flame --shell /usr/sbin/nologin flame \
    && install --directory --owner flame --mode 700 /var/lib/flame /run/flame
COPY --from=build /opt/flame /opt/flame
ENV PATH=/opt/flame/bin:$PATH FLAME_HOME=/var/lib/flame PYTHONUNBUFFERED=1
USER flame
WORKDIR /var/lib/flame
CMD ["flame", "--help"]
