# CAL. The two commands that matter: make demo, make test.
SHELL     := /bin/bash
GO        ?= go
PREFIX    ?= /usr/local
BIN       := $(CURDIR)/bin
VERSION   := $(shell sed -n 's/^const Version = "\(.*\)"/\1/p' nucleus/version.go)
PROGRAMS  := cal nucleus-node nucleus-authority nucleus-tool-proxy
RUNSC_VER := 20260905
export CGO_ENABLED := 0
export GOTOOLCHAIN := local
export GOFLAGS := -trimpath -buildvcs=false

.PHONY: all programs runsc install uninstall demo demo-control test test-long test-firecracker mutants bench lint clean

all: programs runsc ## the four static programs and the pinned runsc, into bin/

programs:
	@mkdir -p $(BIN)
	$(GO) build -ldflags='-s -w' -o $(BIN)/ $(PROGRAMS:%=./cmd/%)

# gVisor is a module of its own, so that its 135 modules stay out of the product's.
runsc: $(BIN)/runsc
$(BIN)/runsc: tools/runsc/go.mod tools/runsc/go.sum
	@mkdir -p $(BIN)
	@echo "building the pinned runsc (once; about two minutes on two cores)"
	cd tools/runsc && $(GO) build -ldflags='-s -w -X gvisor.dev/gvisor/runsc/version.version=$(RUNSC_VER)' -o $@ gvisor.dev/gvisor/runsc

# Under sudo there may be no go, and nothing is to be built as root: what stands in
# bin is installed as it is.
install:
	@test -x $(BIN)/cal -a -x $(BIN)/runsc || $(MAKE) all
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(PROGRAMS:%=$(BIN)/%) $(BIN)/runsc $(DESTDIR)$(PREFIX)/bin/

uninstall:
	rm -f $(PROGRAMS:%=$(DESTDIR)$(PREFIX)/bin/%) $(DESTDIR)$(PREFIX)/bin/runsc

demo: all ## the main job from start to end, in a gVisor machine
	$(GO) run ./internal/demo --bin $(BIN)

demo-control: all ## each wall taken away in turn: the attack must then succeed
	$(GO) run ./internal/demo --bin $(BIN) --control

test: all agents ## everything that must hold; prints its ten slowest tests
	@internal/test.sh ./...

test-long: all agents mutants ## the slow ones: more kills, more rounds, mutants
	CAL_LONG=1 internal/test.sh ./...
	cd bench/log && $(GO) test -count=1 . # our log, read by programs of others

test-firecracker: ## the driver firecracker with the real programs, in an emulated host: FIRECRACKER=PATH JAILER=PATH UNFILTERED=PATH
	@test -n "$(FIRECRACKER)" -a -n "$(JAILER)" || { echo "usage: make test-firecracker FIRECRACKER=PATH JAILER=PATH [UNFILTERED=PATH] [RUN=REGEXP]"; exit 2; }
	$(GO) run ./internal/nested --firecracker $(FIRECRACKER) --jailer $(JAILER) $(if $(UNFILTERED),--unfiltered $(UNFILTERED)) $(if $(RUN),--run '$(RUN)')

mutants: ## break each law and rule of policy and log in turn: a test must notice
	$(GO) run ./internal/mutants

bench: all agents ## measurements, into bench/README.md
	$(GO) run ./internal/bench --bin $(BIN) --out bench/README.md

# Real agents for the end-to-end tests, from the npm registry, at pinned versions.
AGENTS := .cache/agents
agents: $(AGENTS)/.ready
$(AGENTS)/.ready: internal/testenv/agents.json
	@mkdir -p $(AGENTS)
	cp internal/testenv/agents.json $(AGENTS)/package.json
	@if command -v npm >/dev/null; then \
	  cd $(AGENTS) && npm install --ignore-scripts --no-audit --no-fund --loglevel=error && touch .ready; \
	else echo "npm is not installed (apt install npm): the tests with real agents will be skipped"; fi
.PHONY: agents

lint: $(BIN)/golangci-lint
	$(BIN)/golangci-lint run ./...
$(BIN)/golangci-lint:
	GOBIN=$(BIN) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

clean:
	rm -rf bin .cache
