#!/bin/sh
# Simon Willison's llm: $1 is an empty folder for its settings. Its address and model come from BASE_URL and MODEL.
set -eu
export LLM_USER_PATH="$1"
cat > "$1/extra-openai-models.yaml" <<YAML
- model_id: local
  model_name: $MODEL
  api_base: $BASE_URL/v1
  supports_schema: true
  supports_tools: true
YAML
llm keys set openai --value none
printf '{"chat": %s, ' "$(llm -m local -o temperature 0 --no-stream 'What is a harbor?' | python -c 'import json, sys; print(json.dumps(sys.stdin.read().strip()))')"
printf '"stream": %s, ' "$(llm -m local -o temperature 0 'What is a harbor?' | python -c 'import json, sys; print(json.dumps(sys.stdin.read().strip()))')"
printf '"structured": %s}\n' "$(llm -m local -o temperature 0 --schema 'expression str' 'What is 23 * 19?')"
