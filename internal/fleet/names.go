package fleet

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"regexp"
	"strings"
)

// AppName names an app: a DNS label (RFC 1123), unique in the fleet.
type AppName string

// InstanceID names one life of one container, for ever: it is never reused.
// Its form is APP.xxxxxxxx, eight random lower-case base32 characters.
type InstanceID string

// NodeName names one machine: a DNS label, by default the host name's first label.
type NodeName string

// Digest is the content address of an image manifest: "sha256:" and 64 hex digits.
type Digest string

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName reports why s cannot name an app or a node, or nil.
func ValidName(s string) error {
	if !label.MatchString(s) {
		return fmt.Errorf("%q is not a DNS label: use 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit", s)
	}
	return nil
}

var idEncoding = base32.NewEncoding("abcdefghijkmnpqrstuvwxyz23456789").WithPadding(base32.NoPadding)

// NewInstanceID makes the name of a new instance of app.
func NewInstanceID(app AppName) InstanceID {
	var b [5]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails (since Go 1.24)
	return InstanceID(string(app) + "." + idEncoding.EncodeToString(b[:]))
}

// App is the name of the app that the instance belongs to.
func (id InstanceID) App() AppName {
	app, _, _ := strings.Cut(string(id), ".")
	return AppName(app)
}

// Short is the part of the digest that people read: twelve hex digits.
func (d Digest) Short() string {
	_, hex, ok := strings.Cut(string(d), ":")
	if !ok || len(hex) < 12 {
		return string(d)
	}
	return hex[:12]
}
