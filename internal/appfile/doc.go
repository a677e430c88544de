// Package appfile reads app files: YAML that says what an app is, checked
// strictly and completely.
//
// It promises: what Parse returns is a fleet.Spec in which every default is
// filled in, every path is absolute and every value is one that the rest of
// the system can rely on; what it refuses, it refuses with all problems at
// once, each with its place, what is wrong and what is allowed. Hostile input
// costs little: files, documents, aliases and lists are bounded.
//
// The same rules hold for apps that come from elsewhere, such as flags or the
// API: begin with Default, lay values over it, then Complete and Validate.
//
// Start reading at Parse. docs/app-file.md is made by gen from the comments
// of fleet.Spec.
package appfile

//go:generate go run ./gen ../fleet/spec.go ../../docs/app-file.md
