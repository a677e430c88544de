package realapps

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// MariaDB is the database of WordPress, a server on the host. Nobody reaches it
// but by its socket.
type MariaDB struct {
	dir   string // its root
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // of its end
}

// StartMariaDB unpacks the server and its data from the tarball of Heavy into
// an empty directory with a short path, starts it there, and returns when it
// accepts connections. The context bounds the start only.
func StartMariaDB(ctx context.Context, tar, dir string) (*MariaDB, error) {
	unpack := exec.CommandContext(ctx, "tar", "-xf", tar, "-C", dir, "--strip-components=3", "./srv/mariadb")
	if out, err := unpack.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("unpack MariaDB: %w\n%s", err, out)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	m := &MariaDB{dir: dir, cmd: exec.Command("/usr/sbin/mariadbd"), ended: make(chan struct{})}
	m.cmd.Dir, m.cmd.Stderr = "/", log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir, Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start MariaDB: %w", err)
	}
	go func() {
		m.err = m.cmd.Wait()
		close(m.ended)
	}()
	if err := m.greeted(ctx); err != nil {
		_ = m.cmd.Process.Kill()
		<-m.ended
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("start MariaDB: %w\n%s", err, text)
	}
	return m, nil
}

// greeted waits until the server greets somebody who connects. Its socket is
// there earlier, but to be told to end before that makes it hang.
func (m *MariaDB) greeted(ctx context.Context) error {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !m.greets(ctx) {
		select {
		case <-m.ended:
			return fmt.Errorf("it ended: %v", m.cmd.ProcessState)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-again.C:
		}
	}
	return nil
}

func (m *MariaDB) greets(ctx context.Context) bool {
	c, err := new(net.Dialer).DialContext(ctx, "unix", m.Socket())
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	_, err = c.Read(make([]byte, 1))
	return err == nil
}

// Socket is where it listens. Its directory has nothing else in it.
func (m *MariaDB) Socket() string { return filepath.Join(m.dir, "run/mysqld/mysqld.sock") }

// Close ends the server; its directory is the caller's to remove.
func (m *MariaDB) Close() error {
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-m.ended:
		return m.err
	case <-time.After(30 * time.Second):
		_ = m.cmd.Process.Kill()
		<-m.ended
		return fmt.Errorf("stop MariaDB: killed, as it did not end: %w", m.err)
	}
}
