package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A Firecracker that its guest has taken over can put what it likes into its jail: a
// link to a socket of the host's, for one, to which root would then speak. So nothing in a
// jail is ever opened by its path alone.

// within opens a name below root for reference only, following no link, and says
// whether it is of the wanted kind.
func within(root, name string, kind uint32) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	path := filepath.Join(root, name)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	file := os.NewFile(uintptr(fd), path)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		file.Close()
		return nil, err
	}
	if stat.Mode&unix.S_IFMT != kind {
		file.Close()
		return nil, fmt.Errorf("%s is of mode %o, want %o", path, stat.Mode, kind)
	}
	return file, nil
}

// itself is a path that leads to an open file and nowhere else, however long its own
// path is.
func itself(file *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", file.Fd()) }

// dialSocket connects to a socket in the jail.
func (j jail) dialSocket(ctx context.Context, name string) (net.Conn, error) {
	socket, err := within(j.root(), name, unix.S_IFSOCK)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	return (&net.Dialer{}).DialContext(ctx, "unix", itself(socket))
}

// openPipe opens a pipe of the jail for reading; with it what was written stays when
// the writer has ended.
func (j jail) openPipe(name string) (*os.File, error) {
	pipe, err := within(j.root(), name, unix.S_IFIFO)
	if err != nil {
		return nil, err
	}
	defer pipe.Close()
	// Read and write: an end is then always open for writing, and reading waits.
	return os.OpenFile(itself(pipe), os.O_RDWR|unix.O_NONBLOCK, 0)
}

// dialPort connects to a port of the guest's. Firecracker answers "OK" and a number when
// somebody in the guest has accepted.
func (j jail) dialPort(ctx context.Context, port int) (net.Conn, error) {
	conn, err := j.dialSocket(ctx, vsockSocket)
	if err != nil {
		return nil, err
	}
	if err := connectPort(ctx, conn, port); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func connectPort(ctx context.Context, conn net.Conn, port int) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	answer, err := readLine(conn, 32)
	if err != nil {
		return fmt.Errorf("vsock port %d: %w", port, errors.Join(err, context.Cause(ctx)))
	}
	if !strings.HasPrefix(answer, "OK ") {
		return fmt.Errorf("vsock port %d: firecracker answers %q", port, line(answer))
	}
	return nil
}

// readLine reads to the end of the line and not a byte further: what follows is the
// guest's.
func readLine(r io.Reader, most int) (string, error) {
	var text []byte
	for one := make([]byte, 1); len(text) < most; text = append(text, one[0]) {
		if _, err := io.ReadFull(r, one); err != nil {
			return "", err
		}
		if one[0] == '\n' {
			return string(text), nil
		}
	}
	return "", fmt.Errorf("a line longer than %d bytes", most)
}
