# The demo as an image; for an app of your own, replace `demo_app` here and in CMD.
# docker compose -f docker-compose.redis.yml up --build

FROM python:3.14-slim AS build
WORKDIR /source
RUN python -m venv /venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml README.md LICENSE ./
COPY sharedcluster sharedcluster
COPY demo_app demo_app
RUN --mount=type=cache,target=/root/.cache/pip /venv/bin/pip install ".[fast,proctitle]"

FROM python:3.14-slim
LABEL org.opencontainers.image.title="sharedcluster demo" \
      org.opencontainers.image.description="One Flask app on all cores, with one state" \
      org.opencontainers.image.licenses="BSD-3-Clause"
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin app
COPY --from=build /venv /venv
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin
ENV PYTHONUNBUFFERED=1
ENV PYTHONDONTWRITEBYTECODE=1
ENV SHAREDCLUSTER_BIND=0.0.0.0:8000
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# TERM drains. The primary is process 1 and reaps what the app leaves behind, so no init is needed in front of it.
STOPSIGNAL SIGTERM
# Slim images have no curl. http.client, unlike urllib, does not ask a proxy for 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SHAREDCLUSTER_BIND'].rpartition(':')[2]), timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["sharedcluster"]
CMD ["run", "demo_app"]
