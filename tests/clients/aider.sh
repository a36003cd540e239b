#!/bin/sh
# aider, run once without a person, in the empty folder $1. Its address and model come from BASE_URL and MODEL.
set -eu
cd "$1"
OPENAI_API_BASE="$BASE_URL/v1" HOME="$1" aider --model "openai/$MODEL" --message "What is a harbor?" --edit-format ask --no-git \
  --yes-always --no-check-update --no-show-model-warnings --analytics-disable < /dev/null
