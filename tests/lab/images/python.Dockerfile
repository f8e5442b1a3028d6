# Debian's Python where the official image's would be, with the packages that Flame needs beside it.
FROM flame-lab-python
COPY wheels /wheels
RUN ln -s /usr/bin/python3 /usr/local/bin/python \
    && printf '[install]\nno-index = true\nfind-links = /wheels\n' >/etc/pip.conf
