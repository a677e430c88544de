// Package house guards the architecture: which package may import which. It
// has a test only. docs/architecture.md tells why there are floors.
package house
