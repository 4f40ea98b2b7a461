# Serves a run of out/: docs/service.md
FROM python:3.13-slim
WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -r requirements.txt
COPY *.py ./
COPY humptygpt humptygpt
COPY explain explain
USER nobody
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "serve.py", "--host=0.0.0.0"]
