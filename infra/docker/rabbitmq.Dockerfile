# RabbitMQ with one virtual host and one user for Flame, and without guest.
FROM rabbitmq:4
COPY infra/docker/rabbitmq/enabled_plugins /etc/rabbitmq/enabled_plugins
COPY infra/docker/rabbitmq/rabbitmq.conf /etc/rabbitmq/conf.d/90-flame.conf
COPY infra/docker/rabbitmq/definitions.json /etc/rabbitmq/flame.json
COPY infra/docker/rabbitmq/start /usr/local/bin/start-rabbitmq
# The name is a part of where the node keeps its data: a new container must find the old one's.
ENV RABBITMQ_NODENAME=rabbit@localhost
USER rabbitmq
ENTRYPOINT ["start-rabbitmq"]
CMD ["rabbitmq-server"]
