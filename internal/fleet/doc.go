// Package fleet holds the words of FastContainer as Go types: app, revision,
// instance, node, start kinds, states and their legal moves, events and the
// kinds of errors. It has no behaviour beyond what the words themselves
// promise, performs no I/O and imports nothing of this module, so that every
// other package can speak the same language.
//
// Start reading at Spec (what a user deploys), then Revision, Instance and
// State.
package fleet
