package fleet

import (
	"errors"
	"strings"
)

// Kinds of errors. A program asks errors.Is(err, fleet.ErrNotFound); the API
// turns the kind into a status and the CLI into an exit code.
var (
	// ErrNotFound: no app, revision, instance or image has that name.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: the request itself is wrong; repeating it will not help.
	ErrInvalid = errors.New("invalid")
	// ErrConflict: somebody else changed the same thing first; read again.
	ErrConflict = errors.New("conflict")
	// ErrUnavailable: a part is away for now (the store, the registry); try again later.
	ErrUnavailable = errors.New("unavailable")
	// ErrOverloaded: too many or too long holds, or no room; Retry-After fits.
	ErrOverloaded = errors.New("overloaded")
	// ErrFailing: the app cannot start at present; its events say why.
	ErrFailing = errors.New("app is failing")
	// ErrTimeout: a start or a hold took longer than it may.
	ErrTimeout = errors.New("timed out")
	// ErrDenied: the caller may not do this.
	ErrDenied = errors.New("denied")
)

// Error is a sentence for a person: what was tried, on what, what happened,
// and what to do about it. Its Kind is one of the sentinels above.
type Error struct {
	// Op is what was tried: "pull image", "start".
	Op string
	// Subject is what it was tried on: "docker.io/library/nginx:1".
	Subject string
	// Kind is one of the sentinels; nil: an internal error.
	Kind error
	// Err is what happened.
	Err error
	// Hint says what to do next; may be empty.
	Hint string
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Subject != "" {
		b.WriteString(" " + e.Subject)
	}
	switch {
	case e.Err != nil:
		b.WriteString(": " + e.Err.Error())
	case e.Kind != nil:
		b.WriteString(": " + e.Kind.Error())
	}
	return b.String()
}

// Unwrap gives both the kind and the cause.
func (e *Error) Unwrap() []error {
	var errs []error
	for _, err := range []error{e.Kind, e.Err} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Hint is the first hint in err's tree, or "".
func Hint(err error) string {
	for e, ok := errors.AsType[*Error](err); ok; e, ok = errors.AsType[*Error](e.Err) {
		if e.Hint != "" {
			return e.Hint
		}
		if e.Err == nil {
			break
		}
	}
	return ""
}
