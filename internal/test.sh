#!/usr/bin/env bash
# Runs the tests of the given packages. With a C compiler also under the race
# detector, which Go links with it; without one it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
export CAL_BIN="$PWD/bin" CAL_RUNSC="$PWD/bin/runsc" CAL_TEST_AGENTS="$PWD/.cache/agents/node_modules"
race=()
if command -v "${CC:-gcc}" >/dev/null; then
  export CGO_ENABLED=1
  race=(-race)
else
  echo "no C compiler: the tests run without the race detector"
fi
go build -o .cache/testreport ./internal/testreport
go vet ./...
set +e
go test "${race[@]}" -json -timeout 45m "$@" | .cache/testreport
exit "${PIPESTATUS[1]}"
