# Both environments: for scripts/run_loop.sh, scripts/run_ppo.sh and scripts/quickstart.sh.
# docker build -f docker/loop.Dockerfile --build-arg DEVICE=cuda -t baton .
# With a GPU: docker run --gpus all --shm-size 16g -v "$PWD/runs:/baton/runs" -v ~/.cache/huggingface:/root/.cache/huggingface \
#   baton bash scripts/run_loop.sh configs/recipes/qwen-0.5b-24gb.env
FROM python:3.11-slim
ARG DEVICE=cpu
RUN apt-get update -q && apt-get install -y -q --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /baton
COPY . .
ENV BATON_ENVS=/opt/baton
RUN bash scripts/setup_envs.sh --manager venv --device "$DEVICE"
CMD ["bash"]
