FROM python:3.13-slim

WORKDIR /app

COPY requirements.txt .
# This image has no compiler, so packages must be wheels. The one exception is pure Python.
RUN pip install --no-cache-dir --only-binary=:all: --no-binary=openapi-ui-bundles \
    --require-hashes -r requirements.txt

# .dockerignore lets only the service's own files through.
COPY . .

# Make the files readable for the user below, because a strict umask may have made them private.
# That user cannot write, so compile the modules now instead of at every start.
RUN chmod -R a+rX . && python -c "import incidents"

# yoyo asks for the name of the user. The user below has only a number, so USER gives it a name.
ENV API_HOST=0.0.0.0 API_PORT=8000 PYTHONDONTWRITEBYTECODE=1 USER=incidents

USER 10001:10001
EXPOSE 8000

# The service waits one to three minutes for the database and does not answer meanwhile.
# http.client is used because it ignores the proxies that the environment may name.
HEALTHCHECK --interval=10s --timeout=3s --start-period=200s --retries=3 \
    CMD ["python", "-c", "import os, http.client as h; c = h.HTTPConnection('127.0.0.1:' + os.environ['API_PORT'], timeout=2); c.request('GET', '/health/live'); exit(c.getresponse().status != 200)"]

CMD ["python", "incidents.py"]
