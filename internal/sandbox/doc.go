// Package sandbox runs one container on this Linux host: namespaces, root
// filesystem, cgroup, network attachment, capabilities, seccomp and the
// program itself. A Runtime is a body that can do so: the native one of this
// package (Open), the OCI runtimes behind package oci, and a fake for fast
// tests. One conformance suite (package sandboxtest) runs on all of them.
//
// What it promises: after Destroy nothing of a container is left on the host:
// no process, mount, namespace, cgroup, address or file. A container inherits
// no file descriptor of the daemon. No helper process stays beside it.
//
// What it never does: decide anything. It knows neither apps' policies nor
// requests nor images' names; it gets directories and numbers.
package sandbox
