# What `make test` needs, and the checkout.
FROM python:3.11-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make rabbitmq-server redis-server \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /flame
COPY . .
RUN make .venv/.dev
CMD ["make", "test"]
