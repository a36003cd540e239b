#!/bin/sh
# Continue's command line, run once without a person, in the empty folder $1. Its address and model come from BASE_URL and MODEL.
set -eu
cd "$1"
cat > config.yaml <<YAML
name: local
version: 1.0.0
schema: v1
models:
  - name: local
    provider: openai
    model: $MODEL
    apiBase: $BASE_URL/v1
    apiKey: none
    roles: [chat, edit]
YAML
HOME="$1" cn --config config.yaml -p "What is a harbor?" < /dev/null
