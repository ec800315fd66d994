# docker build --tag effilora .                      on a CPU
# docker build --tag effilora --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .      with CUDA
#
# docker run --rm -v "$PWD:/work" effilora train --output_dir cat
# docker run --rm --gpus all -v "$PWD:/work" effilora train --pretrained_model_name_or_path ... --output_dir my-dog
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=optimizers,trackers,data,judge

WORKDIR /src
COPY constraints.txt ./
RUN torch=$(grep '^torch==' constraints.txt) \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "$torch" \
    && grep -v '^torch==' constraints.txt > others.txt
COPY pyproject.toml README.md LICENSE ./
COPY effilora_diffusion effilora_diffusion
COPY assets/base assets/base
COPY assets/example_subject assets/example_subject
RUN pip install --no-cache-dir --constraint others.txt ".[$EXTRAS]" && rm -rf /src

WORKDIR /work
ENTRYPOINT ["effilora"]
CMD ["--help"]
