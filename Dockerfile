# docker build -t dreambooth .     How to run it, on one GPU, read-only or by Apptainer: docs/container.md
#
# BASE      any Debian or Ubuntu (by default pinned by the digest of its index, which has every architecture); one without
#           Python is given its own (3.11 or later: bookworm, noble). torch's wheels bring their CUDA libraries, so
#           nvidia/cuda:*-devel-* is needed only by what compiles on its first use (deepspeed).
# INDEX     a further package index; https://download.pytorch.org/whl/cpu has torch without CUDA, a tenth of the size.
# EXTRAS    of setup.cfg, with commas: deepspeed
# REVISION  the commit, for the label
ARG BASE=python:3.12.14-slim-trixie@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea

FROM ${BASE} AS python
# hadolint ignore=DL3008 # which Python there is, the base decides
RUN python3 -c "import ensurepip" 2>/dev/null || { apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }

FROM python AS build
ARG EXTRAS=""
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --constraint constraints.txt setuptools
COPY setup.cfg pyproject.toml README.md LICENSE ./
# The libraries, apart from the package: gigabytes that stay cached when only our code changes.
RUN /opt/build/bin/python -c "from setuptools.config.setupcfg import read_configuration as read; \
    options = read('setup.cfg', ignore_option_errors=True)['options']; \
    chosen = [options['extras_require'][name] for name in '${EXTRAS}'.split(',') if name]; \
    print(*sum(chosen, options['install_requires']), sep='\n')" >/requirements.txt
COPY conf conf
COPY dreambooth dreambooth
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python
ARG INDEX=""
COPY --from=build /requirements.txt /src/constraints.txt /opt/
RUN python3 -m venv /opt/dreambooth && /opt/dreambooth/bin/pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} \
    --constraint /opt/constraints.txt --requirement /opt/requirements.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    /opt/dreambooth/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
    && mkdir -p /work/outputs /cache/huggingface && chmod 1777 /work /work/outputs /cache /cache/huggingface
# Any user id may run it, and most have no name in the image: torch and others ask for one, and for a home.
ENV PATH=/opt/dreambooth/bin:$PATH PYTHONUNBUFFERED=1 HOME=/cache USER=dreambooth HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG REVISION=""
LABEL org.opencontainers.image.title="dreambooth" \
    org.opencontainers.image.description="A folder of photos in, a text-to-image model that knows the subject out" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"
VOLUME ["/work/outputs", "/cache"]
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["dreambooth"]
