# docker build -t dreambooth .          (a CUDA base: --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 needs python3.11+)
# docker run --rm --gpus all -v "$PWD/photos:/work/photos" -v "$PWD/outputs:/work/outputs" --user "$(id -u):$(id -g)" \
#     dreambooth model=sd15 trainer=gpu model.data.instance_dir=photos
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY conf conf
COPY dreambooth dreambooth
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir "setuptools>=77" \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE}
ENV PATH=/opt/dreambooth/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/work/.cache/huggingface
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
RUN python3 -m venv /opt/dreambooth \
    && /opt/dreambooth/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/wheels/*.whl \
    && rm -r /tmp/wheels /tmp/constraints.txt \
    && useradd --create-home --uid 1000 trainer \
    && mkdir -p /work && chmod 1777 /work
USER 1000
WORKDIR /work
ENTRYPOINT ["dreambooth"]
