// Package oci runs containers with an OCI runtime that is installed on the
// host: crun, runc, or gVisor's runsc. It is the second body of the contract
// in package sandbox, for those who want a runtime that they know, or a kernel
// of the container's own.
//
// What is special about a runtime's container, compared with one that its
// command line makes: everything that the host could keep is made by us, in a
// mount namespace that lives no longer than the call of the runtime. There the
// root filesystem is put together (an overlay over layers whose ownership is
// mapped, with a writable layer in memory), so no mount of it is ever visible
// on the host and none can be left behind. The network namespace is made and
// connected beforehand. The runtime gets a bundle, starts the program and
// ends: no monitor stays beside the container, since the daemon makes itself
// the reaper of its orphans and watches the program by its pidfd.
//
// What it owns on the host: Config.Dir with one bundle for each container, the
// cgroups below Config.Cgroup, and links of its Network.
//
// Start reading at Open in oci.go, then container.go.
package oci
