#!/bin/sh
# Codex, run once without a person: $1 is an empty folder for its settings, $2 one to work in.
# Its address and model come from BASE_URL and MODEL. Its own first prompt has 40 kB, most of it instructions and tools that a
# small model does not need; with PROMPT=short it has 6.
set -eu
short=""
if [ "${PROMPT:-short}" = short ]; then
  echo "You are a coding agent." > "$1/instructions.md"
  short="model_instructions_file = \"$1/instructions.md\"
web_search = \"disabled\"
include_permissions_instructions = false"
fi
cat > "$1/config.toml" <<TOML
model = "$MODEL"
model_provider = "openelm_mlx"
$short
[model_providers.openelm_mlx]
name = "openelm_mlx"
base_url = "$BASE_URL/v1"
wire_api = "responses"
TOML
if [ -n "$short" ]; then
  cat >> "$1/config.toml" <<TOML
[features]
multi_agent = false
goals = false
[skills]
include_instructions = false
TOML
fi
cd "$2"
CODEX_HOME="$1" codex exec --json --skip-git-repo-check --sandbox read-only "What is a harbor?" < /dev/null
