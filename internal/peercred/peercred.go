// Package peercred says which user is at the other end of a unix socket, as the kernel does.
package peercred

import (
	"errors"
	"fmt"
	"net"
)

// UID returns the user id of the process that made the other end of conn: who connected, or who
// listens.
func UID(conn net.Conn) (int, error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("peer of a %T", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var uid int
	var credErr error
	err = raw.Control(func(fd uintptr) { uid, credErr = uidOf(int(fd)) })
	return uid, errors.Join(err, credErr)
}
