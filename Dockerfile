FROM python:3.13-slim

WORKDIR /app

COPY requirements.txt .
# There is no compiler here: all but one package, which is pure Python, must come as wheels.
RUN pip install --no-cache-dir --only-binary=:all: --no-binary=openapi-ui-bundles \
    --require-hashes -r requirements.txt

# What .dockerignore lets through.
COPY . .

# A checkout made under a strict umask is readable by its owner alone, which the user below is not.
# That user can write nothing, so what is imported is compiled now rather than at every start.
RUN chmod -R a+rX . && python -c "import incidents"

# yoyo asks for the user's name, and a number without a passwd entry has none.
ENV API_HOST=0.0.0.0 API_PORT=8000 PYTHONDONTWRITEBYTECODE=1 USER=incidents

USER 10001:10001
EXPOSE 8000

# http.client never goes through a proxy that the environment names; the database is waited for
# for up to a minute, in which nothing answers yet.
HEALTHCHECK --interval=10s --timeout=3s --start-period=70s --retries=3 \
    CMD ["python", "-c", "import os, http.client as h; c = h.HTTPConnection('127.0.0.1:' + os.environ['API_PORT'], timeout=2); c.request('GET', '/health/live'); exit(c.getresponse().status != 200)"]

CMD ["python", "incidents.py"]
