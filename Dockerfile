# The OpenAI-compatible server on CPUs: docker build -t specdec . && docker run -p 8000:8000 -e SPECDEC_API_KEY=... specdec demo
FROM python:3.11-slim AS build
# a compiler for the native kernels, which the wheel then holds for every processor that they support
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /tmp/
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/*.whl) && pip install --no-cache-dir -c /tmp/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu "${wheel}[serve]"
RUN useradd --create-home specdec
USER specdec
VOLUME /home/specdec/.cache
EXPOSE 8000
ENTRYPOINT ["specdec", "serve", "--host", "0.0.0.0"]
