# docker build --target client -t flower_client .
# docker build --target server -t flower_server .
# docker build --target server-slim -t flower_server_slim .    (no framework and no data: see docs/containers.md)
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore HOME=/home/app
COPY containers/base.txt containers/
RUN pip install -r containers/base.txt
# The folders are open to any user, so that --user can be the owner of folders that are mounted.
RUN useradd --create-home app \
    && mkdir -p /app/runs /data /keys/clients && chown -R app /app /data /keys && chmod 1777 /home/app /app/runs /data

FROM base AS pytorch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Wheels for the CPU alone are a tenth of those for GPUs; where that index cannot be reached, PyPI's do as well.
RUN pip install --retries 1 --timeout 15 --index-url "${TORCH_INDEX}" torch==2.14.1 torchvision==0.29.1 \
    || pip install torch==2.14.1 torchvision==0.29.1
COPY containers/client.txt containers/
RUN pip install -r containers/client.txt

FROM pytorch AS client
COPY pyproject.toml cifar.py cifar_data.py client.py server.py ./
COPY federation federation
USER app
VOLUME ["/data", "/keys/clients"]
HEALTHCHECK --start-period=5m CMD grep -qs "[f]lower-supernode" /proc/[0-9]*/cmdline
ENTRYPOINT ["python", "client.py"]

FROM pytorch AS server
COPY containers/pictures.txt containers/server.txt containers/
RUN pip install -r containers/pictures.txt -r containers/server.txt
COPY pyproject.toml cifar.py cifar_data.py client.py server.py ./
COPY federation federation
USER app
VOLUME ["/data", "/keys", "/app/runs"]
EXPOSE 8080
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import socket; socket.create_connection(('localhost', 8080), 5)"]
ENTRYPOINT ["python", "server.py", "--address", "0.0.0.0:8080"]

FROM base AS server-slim
COPY containers/pictures.txt containers/
RUN pip install -r containers/pictures.txt
COPY pyproject.toml cifar.py cifar_data.py client.py server.py ./
COPY federation federation
USER app
VOLUME ["/data", "/keys", "/app/runs"]
EXPOSE 8080
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import socket; socket.create_connection(('localhost', 8080), 5)"]
ENTRYPOINT ["python", "server.py", "--address", "0.0.0.0:8080", "--run-config", "server-evaluation=false"]
