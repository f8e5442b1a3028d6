FROM flame-lab-postgres
RUN ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ \
    ; install --directory --owner postgres --mode 700 /var/lib/postgresql/data /var/run/postgresql
COPY start-postgres /usr/local/bin/
ENV PGDATA=/var/lib/postgresql/data
ENTRYPOINT ["start-postgres"]
CMD ["postgres"]
