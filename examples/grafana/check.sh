#!/usr/bin/env bash
# Checks the files here with promtool (Debian: `prometheus`).
set -euo pipefail
cd "$(dirname "$0")"
promtool check config prometheus.yml
rules=$(mktemp --suffix=.yml)
trap 'rm -f "$rules"' EXIT
# Each query of the dashboard as a rule, since promtool reads rules.
python3 - >"$rules" <<'PY'
import json

print("groups:\n  - name: dashboard\n    rules:")
for panel in json.load(open("dashboard.json"))["panels"]:
    for number, target in enumerate(panel.get("targets", [])):
        expr = target["expr"].replace("$__rate_interval", "1m")
        print(f"      - record: panel:{panel['id']}:{number}\n        expr: {json.dumps(expr)}")
PY
promtool check rules "$rules"
