package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const (
	// keepOld files are kept beside the one that is written.
	keepOld = 2
	// pause after a failure, so that a full disk is neither hammered nor
	// talked about more than twice a minute.
	pause = 30 * time.Second
)

// disk is the file of a log. Only the writer's goroutine uses it. Every
// failure is said once, until writing works again.
type disk struct {
	name   string
	max    int64
	file   *os.File
	size   int64     // of whole lines
	missed int       // events that are not in the file, since the last good write
	sick   time.Time // when writing failed last; zero: it works
	logger *slog.Logger
	line   bytes.Buffer
}

// openDisk opens the file and reads the newest events, at most n, oldest
// first. clean says that the process that wrote it closed it.
func openDisk(name string, size int64, n int, logger *slog.Logger) (d *disk, past []fleet.Event, clean bool, err error) {
	d = &disk{name: name, max: size, logger: logger}
	if err := d.open(); err != nil {
		return nil, nil, false, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.file.Close())
		}
	}()
	data, err := tail(d.file, 2*size)
	if err != nil {
		return nil, nil, false, err
	}
	whole := bytes.LastIndexByte(data, '\n') + 1
	if torn := len(data) - whole; torn > 0 {
		logger.Warn("event log ended within a line; cut off", "file", name, "bytes", torn)
		d.size -= int64(torn)
		if err := d.file.Truncate(d.size); err != nil {
			return nil, nil, false, err
		}
	}
	data = data[:whole]
	// A blank line at the end is the mark of close. It is taken away, so that
	// it does not speak for this process too.
	if clean = bytes.HasSuffix(data, []byte("\n\n")); clean {
		d.size--
		if err := d.file.Truncate(d.size); err != nil {
			return nil, nil, false, err
		}
	}
	past, bad := parse(data, n)
	for i := 1; i <= keepOld && len(past) < n; i++ {
		old, err := readOld(d.old(i), 2*size)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			logger.Warn("event log: an old file cannot be read", "file", d.old(i), "error", err)
			break
		}
		more, worse := parse(old, n-len(past))
		past, bad = append(more, past...), bad+worse
	}
	if bad > 0 {
		logger.Warn("event log has lines that are no events; skipped", "file", name, "lines", bad)
	}
	// Numbers rise along the log; what does not rise is not ours.
	var last uint64
	past = slices.DeleteFunc(past, func(e fleet.Event) bool {
		if e.Seq <= last {
			return true
		}
		last = e.Seq
		return false
	})
	isNew := d.size == 0 && len(past) == 0
	return d, past, clean || isNew, nil
}

// append writes a batch. It never gives up: a later batch tries again.
func (d *disk) append(batch []fleet.Event) {
	if !d.sick.IsZero() && time.Since(d.sick) < pause {
		d.missed += len(batch)
		return
	}
	for len(batch) > 0 {
		n, err := d.appendSome(batch)
		if err != nil {
			d.missed += len(batch)
			if d.sick.IsZero() {
				d.logger.Warn("event log cannot be written; events are in memory only", "file", d.name, "error", err)
			}
			d.sick = time.Now()
			return
		}
		if !d.sick.IsZero() {
			d.logger.Info("event log can be written again", "file", d.name, "missed", d.missed)
		}
		d.sick, d.missed = time.Time{}, 0
		batch = batch[n:]
	}
}

// appendSome writes as many events of batch as fit before the file has to be
// rotated, at least one, in one write. Of a write that failed nothing stays.
func (d *disk) appendSome(batch []fleet.Event) (n int, err error) {
	d.line.Reset()
	for _, e := range batch {
		start := d.line.Len()
		if err := json.NewEncoder(&d.line).Encode(e); err != nil {
			return 0, err
		}
		if n > 0 && d.size+int64(d.line.Len()) > d.max {
			d.line.Truncate(start)
			break
		}
		n++
	}
	if d.size > 0 && d.size+int64(d.line.Len()) > d.max {
		if err := d.rotate(); err != nil {
			return 0, err
		}
	}
	return n, d.put(d.line.Bytes())
}

// put adds whole lines or nothing.
func (d *disk) put(lines []byte) error {
	if d.file == nil {
		if err := d.open(); err != nil {
			return err
		}
	}
	if _, err := d.file.Write(lines); err != nil {
		return errors.Join(err, d.file.Truncate(d.size))
	}
	d.size += int64(len(lines))
	return nil
}

// rotate moves each file one number on and begins a new one. If it fails on
// the way, d.file is nil or the old file, and it can be called again.
func (d *disk) rotate() error {
	if d.file != nil {
		err := errors.Join(d.file.Sync(), d.file.Close())
		d.file = nil
		if err != nil {
			return fmt.Errorf("rotate: %w", err)
		}
	}
	for i := keepOld; i >= 1; i-- {
		if err := os.Rename(d.old(i-1), d.old(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate: %w", err)
		}
	}
	d.size = 0
	return d.open()
}

func (d *disk) open() error {
	f, err := os.OpenFile(d.name, os.O_RDWR|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", d.name)
	}
	if err == nil {
		err = f.Chmod(0o600)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	d.file, d.size = f, info.Size()
	return nil
}

// close marks the end, so that the next process can go on counting at once.
func (d *disk) close() error {
	var err error
	if d.missed == 0 && d.size > 0 {
		err = d.put([]byte("\n"))
	}
	if d.file == nil {
		return err
	}
	return errors.Join(err, d.file.Sync(), d.file.Close())
}

func (d *disk) old(i int) string {
	if i == 0 {
		return d.name
	}
	return fmt.Sprintf("%s.%d", d.name, i)
}

func readOld(name string, n int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return tail(f, n)
}

// tail reads the last n bytes of f.
func tail(f *os.File, n int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	start := max(0, info.Size()-n)
	return io.ReadAll(io.NewSectionReader(f, start, info.Size()-start))
}

// parse gives the last n events of whole lines, oldest first, and how many
// lines were none.
func parse(data []byte, n int) (events []fleet.Event, bad int) {
	for len(data) > 0 && len(events) < n {
		data = data[:len(data)-1] // its newline
		start := bytes.LastIndexByte(data, '\n') + 1
		line := data[start:]
		data = data[:start]
		if len(line) == 0 {
			continue
		}
		var e fleet.Event
		if err := json.Unmarshal(line, &e); err != nil || e.Seq == 0 || e.Seq > maxSeq {
			bad++
			continue
		}
		events = append(events, e)
	}
	slices.Reverse(events)
	return events, bad
}
