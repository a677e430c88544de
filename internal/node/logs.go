package node

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// keptLogs is how many logs of ended instances are kept for each app.
const keptLogs = 5

// logPath is where an instance's output goes. Each app has a directory of its
// own, so that nobody ever looks through the logs of all.
func (n *Node) logPath(id fleet.InstanceID) string {
	return filepath.Join(n.cfg.LogDir, string(id.App()), string(id)+".log")
}

// logFiles of an app or an instance, oldest first.
func (n *Node) logFiles(name string) ([]string, error) {
	dir := filepath.Join(n.cfg.LogDir, string(fleet.InstanceID(name).App()))
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list logs: %w", err)
	}
	type file struct {
		path string
		at   time.Time
	}
	var files []file
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".log")
		if !ok || id != name && string(fleet.InstanceID(id).App()) != name {
			continue
		}
		if info, err := e.Info(); err == nil {
			files = append(files, file{filepath.Join(dir, e.Name()), info.ModTime()})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(a.at.Compare(b.at), strings.Compare(a.path, b.path)) })
	paths := make([]string, len(files))
	for i, f := range files {
		paths[i] = f.path
	}
	return paths, nil
}

// pruneLogs removes the oldest logs of an app's ended instances.
func (n *Node) pruneLogs(app fleet.AppName) {
	files, err := n.logFiles(string(app))
	if err != nil {
		n.cfg.Logger.Warn("prune logs", "app", app, "error", err)
		return
	}
	n.mu.Lock()
	files = slices.DeleteFunc(files, func(p string) bool {
		id := fleet.InstanceID(strings.TrimSuffix(filepath.Base(p), ".log"))
		_, live := n.instances[id]
		return live || n.saving[id]
	})
	n.mu.Unlock()
	for _, p := range files[:max(0, len(files)-keptLogs)] {
		if err := spare(p); err != nil {
			_ = os.Remove(p)
		}
	}
}

// spareLog is an empty file in an app's directory of logs.
const spareLog = "spare"

// spare empties a log that nobody writes to any more, for the next instance. To
// make and remove a file for each costs more: ext4 does not give a number away
// again for some seconds, and looks for another one among all of those.
func spare(log string) error {
	return errors.Join(os.Truncate(log, 0), os.Rename(log, filepath.Join(filepath.Dir(log), spareLog)))
}

// placeLog makes the place for a log, out of the spare one if there is one.
func placeLog(log string) error {
	err := os.Rename(filepath.Join(filepath.Dir(log), spareLog), log)
	if errors.Is(err, os.ErrNotExist) {
		err = os.MkdirAll(filepath.Dir(log), 0o700)
	}
	if err != nil {
		return fmt.Errorf("make place for a log: %w", err)
	}
	return nil
}

// Forget removes the logs, the saved processes, and if volumes is true the named volumes, of an app
// that is deleted.
func (n *Node) Forget(app fleet.AppName, volumes bool) error {
	errs := []error{os.RemoveAll(filepath.Join(n.cfg.LogDir, string(app))), n.ForgetSaved(app)}
	if volumes {
		errs = append(errs, os.RemoveAll(filepath.Join(n.cfg.VolumeDir, string(app))))
	}
	return errors.Join(errs...)
}

// Logs writes the last lines of an app or an instance, and with follow what
// comes after them, until ctx ends. With follow, a new instance of the app is
// taken up as it appears.
func (n *Node) Logs(ctx context.Context, name string, lines int, follow bool, w io.Writer) error {
	files, err := n.logFiles(name)
	if err != nil {
		return err
	}
	if len(files) == 0 && !follow {
		return &fleet.Error{Op: "read logs of", Subject: name, Kind: fleet.ErrNotFound, Hint: "nothing of it has run here yet: a request starts it"}
	}
	at := map[string]int64{} // read so far
	for i, p := range files {
		size := int64(0)
		if st, err := os.Stat(p); err == nil {
			size = st.Size()
		}
		at[p] = size
		if i < len(files)-1 { // the newest alone answers "the last lines"
			continue
		}
		for _, line := range tailLines(p, lines, 1<<20) {
			if _, err := io.WriteString(w, line+"\n"); err != nil {
				return err
			}
		}
	}
	if !follow {
		return nil
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if files, err = n.logFiles(name); err != nil {
			return err
		}
		for _, p := range files {
			if at[p], err = copyFrom(w, p, at[p]); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// copyFrom copies what a file has beyond an offset, at most a mebibyte at a
// time. A file that shrank (its oldest part was cut off, or its container
// truncated it) is read on from its end.
func copyFrom(w io.Writer, path string, from int64) (int64, error) {
	f, err := openLog(path)
	if err != nil {
		return from, nil // gone with its instance
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil || st.Size() <= from {
		if err == nil && st.Size() < from {
			return st.Size(), nil
		}
		return from, nil
	}
	k, err := io.Copy(w, io.NewSectionReader(f, from, min(st.Size()-from, 1<<20)))
	return from + k, err
}

// openLog opens a log, which its container may have made anything that a file
// can be, except another file.
func openLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// tailLines gives the last lines of a file, at most that many and that many
// bytes. A line that is too long is cut.
func tailLines(path string, lines int, most int64) []string {
	if path == "" || lines <= 0 {
		return nil
	}
	f, err := openLog(path)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return nil
	}
	from := max(0, st.Size()-most)
	buf := make([]byte, min(most, st.Size()))
	k, err := f.ReadAt(buf, from)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	buf = bytes.TrimRight(buf[:k], "\n")
	if len(buf) == 0 {
		return nil
	}
	all := strings.Split(string(buf), "\n")
	return slices.Clone(all[max(0, len(all)-lines):])
}
