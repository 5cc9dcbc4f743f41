# The training environment: TRL, Accelerate, DeepSpeed.
# docker build -f docker/training.Dockerfile --build-arg DEVICE=cuda -t baton-training .
# With a GPU: docker run --gpus all -v "$PWD/runs:/baton/runs" baton-training python dpo_iteration/run_dpo.py …
FROM python:3.11-slim
ARG DEVICE=cpu
RUN apt-get update -q && apt-get install -y -q --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /baton
COPY . .
ENV BATON_ENVS=/opt/baton
RUN bash scripts/setup_envs.sh --manager venv --device "$DEVICE" --only training
ENV PATH=/opt/baton/training/bin:$PATH PYTHONPATH=/baton
CMD ["bash"]
