package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	maxHello     = 80 << 10 // bytes of a ClientHello with its records
	extensionECH = 0xfe0d   // RFC 9849: encrypted_client_hello
)

// unrecognizedName is the TLS alert that tells a client why it is cut off.
var unrecognizedName = []byte{21, 3, 1, 0, 2, 2, 112}

// errHello marks what is wrong with the first bytes of a connection.
type errHello struct{ reason string }

func (e errHello) Error() string { return e.reason }

// looksLikeTLS waits for the first bytes and reports whether they begin a TLS
// handshake record.
func looksLikeTLS(r *bufio.Reader) (bool, error) {
	first, err := r.Peek(1)
	if err != nil {
		return false, err
	}
	if first[0] != 22 {
		return false, nil
	}
	two, err := r.Peek(2)
	if err != nil {
		return false, err
	}
	return two[1] == 3, nil
}

// readHello reads a ClientHello for a connection that asked for host, and
// returns the bytes that it took from r once the hello names that host. A hello
// with an encrypted second name cannot be judged and is refused. For a host
// that is an address no name may be given (RFC 6066, section 3).
func readHello(r io.Reader, host string) ([]byte, error) {
	var (
		taken bytes.Buffer
		hello *tls.ClientHelloInfo
	)
	// The handshake of the standard library is the parser; it never gets
	// further than the hello, and what it writes goes nowhere.
	from := helloConn{io.TeeReader(io.LimitReader(r, maxHello), &taken)}
	err := tls.Server(from, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			hello = h
			return nil, errors.New("read")
		},
	}).Handshake()
	if hello == nil {
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return nil, err
		}
		return nil, errHello{fmt.Sprintf("no TLS ClientHello: %v", err)}
	}
	if slices.Contains(hello.Extensions, extensionECH) {
		return nil, errHello{"the ClientHello encrypts the name that it asks for (ECH)"}
	}
	if err := checkName(hello.ServerName, host); err != nil {
		return nil, err
	}
	return taken.Bytes(), nil
}

func checkName(name, host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		if name != "" {
			return errHello{fmt.Sprintf("TLS name %.80q, asked for the address %s", name, host)}
		}
		return nil
	}
	if name == "" {
		return errHello{fmt.Sprintf("no TLS name, asked for %s", host)}
	}
	if got, err := ParseHost(name); err != nil || got != host {
		return errHello{fmt.Sprintf("TLS name %.80q, asked for %s", name, host)}
	}
	return nil
}

// helloConn is a connection that can only be read.
type helloConn struct{ io.Reader }

func (helloConn) Write(b []byte) (int, error)      { return len(b), nil }
func (helloConn) Close() error                     { return nil }
func (helloConn) LocalAddr() net.Addr              { return nil }
func (helloConn) RemoteAddr() net.Addr             { return nil }
func (helloConn) SetDeadline(time.Time) error      { return nil }
func (helloConn) SetReadDeadline(time.Time) error  { return nil }
func (helloConn) SetWriteDeadline(time.Time) error { return nil }
