# FastContainer: `make build`, `make demo`, `make test`. Everything a target
# needs beyond Go is installed by it (hack/prereqs.sh; Debian packages, as root).

VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
GOFLAGS_BUILD = -trimpath -ldflags "-s -w -X main.version=$(VERSION)"
GOLANGCI_VERSION = v2.15.0
export CGO_ENABLED ?= 0

.PHONY: build demo test check race test-v2 bench experiments lint fmt vet tidy clean prereqs

build: ## bin/fastcontainer, static
	go build $(GOFLAGS_BUILD) -o bin/fastcontainer ./cmd/fastcontainer

demo: build ## serves, deploys an example, shows a cold and a warm request
	hack/demo.sh

prereqs: ## installs what the tests need
	hack/prereqs.sh

test: prereqs build race test-v2 ## everything; what CI runs

race:
	CGO_ENABLED=1 go build -race ./...
	@# One package at a time: several count what is left on the host.
	CGO_ENABLED=1 go test -race -p 1 -timeout 25m ./...

test-v2: build ## sandbox and life on cgroup v2, in a virtual machine
	hack/v2/run.sh

check: fmt vet tidy lint race ## what a change must pass before it is sent

fmt:
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "not gofmt-ed:"; echo "$$out"; exit 1; fi

vet:
	go vet ./...

tidy:
	go mod tidy -diff

lint: .cache/bin/golangci-lint-$(GOLANGCI_VERSION)
	.cache/bin/golangci-lint-$(GOLANGCI_VERSION) run ./...

.cache/bin/golangci-lint-$(GOLANGCI_VERSION):
	GOBIN=$(CURDIR)/.cache/bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv .cache/bin/golangci-lint $@

bench: prereqs build ## every figure of docs/benchmarks.md
	go run ./bench

experiments: prereqs build ## every picture of docs/experiments
	mkdir -p docs/experiments
	go run ./bench -experiments

clean:
	rm -rf bin .cache
