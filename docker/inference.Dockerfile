# The inference environment: vLLM.
# docker build -f docker/inference.Dockerfile --build-arg DEVICE=cuda -t baton-inference .
# With a GPU: docker run --gpus all -v "$PWD/runs:/baton/runs" baton-inference python generation/get_hf2.py …
FROM python:3.11-slim
ARG DEVICE=cpu
RUN apt-get update -q && apt-get install -y -q --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /baton
COPY . .
ENV BATON_ENVS=/opt/baton
RUN bash scripts/setup_envs.sh --manager venv --device "$DEVICE" --only inference
ENV PATH=/opt/baton/inference/bin:$PATH PYTHONPATH=/baton
CMD ["bash"]
