package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// socketPair returns a connected pair: ours as a connection, theirs as a file
// for a child.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ourFile := os.NewFile(uintptr(fds[0]), "ours")
	defer ourFile.Close()
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ourFile)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

// fileConn takes over an inherited socket.
func fileConn(fd int, name string) (*net.UnixConn, error) {
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), name)
	if f == nil {
		return nil, fmt.Errorf("descriptor %d (%s) is not open", fd, name)
	}
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d (%s): %w", fd, name, err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("descriptor %d (%s) is no unix socket", fd, name)
	}
	return unixConn, nil
}

func writeBlock(w io.Writer, data []byte) error {
	block := binary.BigEndian.AppendUint32(nil, uint32(len(data)))
	_, err := w.Write(append(block, data...))
	return err
}

func readBlock(r io.Reader, limit int) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if int64(n) > int64(limit) {
		return nil, fmt.Errorf("block of %d bytes, at most %d", n, limit)
	}
	data := make([]byte, n)
	_, err := io.ReadFull(r, data)
	return data, err
}

const maxPassed = 16 // descriptors in one message

func sendFiles(conn *net.UnixConn, text string, files []*os.File) error {
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = syscall.UnixRights(fds...)
	}
	if text == "" {
		text = "?"
	}
	_, _, err := conn.WriteMsgUnix([]byte(text), rights, nil)
	return err
}

func recvFiles(conn *net.UnixConn) (string, []*os.File, error) {
	text := make([]byte, 4096)
	rights := make([]byte, syscall.CmsgSpace(4*maxPassed))
	n, rn, _, _, err := conn.ReadMsgUnix(text, rights) // net sets MSG_CMSG_CLOEXEC
	if err != nil {
		return "", nil, err
	}
	if n == 0 {
		return "", nil, io.EOF
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return "", nil, err
	}
	var files []*os.File
	for i := range messages {
		fds, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			return "", nil, errors.New("control message without descriptors")
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return string(text[:n]), files, nil
}
