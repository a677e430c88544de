// Package e2e tests the whole program from outside: the real binary as a
// daemon with the host's own kernel, real images, real clients. It has tests
// only.
package e2e
