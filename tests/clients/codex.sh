#!/bin/sh
# Codex, run once without a person: $1 is an empty folder for its settings, $2 one to work in.
# Its address and model come from BASE_URL and MODEL.
set -eu
cat > "$1/config.toml" <<TOML
model = "$MODEL"
model_provider = "openelm_mlx"
[model_providers.openelm_mlx]
name = "openelm_mlx"
base_url = "$BASE_URL/v1"
wire_api = "responses"
TOML
cd "$2"
CODEX_HOME="$1" codex exec --json --skip-git-repo-check --sandbox read-only "What is a harbor?" < /dev/null
