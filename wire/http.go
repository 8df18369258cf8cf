package wire

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"time"

	"cal/nucleus"
)

const (
	upgradeProtocol = "nucleus-stream"
	maxAnswerHead   = 64 << 10
	upgradeWrite    = 10 * time.Second // for the few bytes of an answer's head
)

// DialFunc makes one connection to the node.
type DialFunc func(ctx context.Context) (net.Conn, error)

// UnixClient returns a client whose URLs are http://nucleus/..., sent to a unix
// socket whatever their host. It follows no redirect: a signature is for one
// target. Time limits are those of the requests' contexts. Its owner calls
// CloseIdleConnections at the end.
func UnixClient(socket string) *http.Client {
	return Client(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
}

// Client returns a client like UnixClient's over any connection to the node, such
// as a stream of a session.
func Client(dial DialFunc) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableCompression:     true,
			MaxIdleConnsPerHost:    32,
			IdleConnTimeout:        time.Minute, // below the server's, so that no request meets a closing connection
			MaxResponseHeaderBytes: maxAnswerHead,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Upgrade answers a request that asks for a stream with 101 and takes its
// connection over. The body must have been read. A request that asks for
// something else gets a *nucleus.Error of kind invalid, and is not answered yet.
func Upgrade(w http.ResponseWriter, r *http.Request) (*Stream, error) {
	if !hasToken(r.Header, "Connection", "upgrade") || !hasToken(r.Header, "Upgrade", upgradeProtocol) {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "%s %s answers with a stream: it wants Connection: Upgrade and Upgrade: %s", r.Method, r.URL.Path, upgradeProtocol)
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindInternal, "taking over the connection: %v", err)
	}
	conn.SetWriteDeadline(time.Now().Add(upgradeWrite))
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+upgradeProtocol+"\r\n\r\n")
	if err != nil {
		conn.Close()
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "answering with a stream: %v", err)
	}
	conn.SetDeadline(time.Time{})
	return NewStream(bufferedConn{conn, buffered.Reader}), nil
}

// DialUpgrade sends a signed request that asks for a stream over a connection of
// its own. An answer other than 101 comes back as the *nucleus.Error that it
// carries. The context bounds the time until the answer; the stream outlives it.
func DialUpgrade(ctx context.Context, dial DialFunc, r *http.Request) (*Stream, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "dialling the node: %v", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(past) })
	stream, refusal, err := upgrade(conn, r)
	switch cut := !stop(); { // then the deadline was set, or will be
	case refusal != nil:
		err = refusal
	case cut:
		err = nucleus.Errorf(nucleus.KindTimeout, "asking the node for a stream: %v", context.Cause(ctx))
	case err != nil:
		err = nucleus.Errorf(nucleus.KindUnavailable, "asking the node for a stream: %v", err)
	default:
		return stream, nil
	}
	conn.Close()
	return nil, err
}

func upgrade(conn net.Conn, r *http.Request) (stream *Stream, refusal *nucleus.Error, err error) {
	r = r.Clone(r.Context())
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", upgradeProtocol)
	if err := r.Write(conn); err != nil {
		return nil, nil, err
	}
	limited := &io.LimitedReader{R: conn, N: maxAnswerHead}
	reader := bufio.NewReader(limited)
	resp, err := http.ReadResponse(reader, r) //nolint:bodyclose // the connection is the stream's, or closed by DialUpgrade
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		limited.N = maxErrorBody
		return nil, ReadError(resp), nil
	}
	if !hasToken(resp.Header, "Upgrade", upgradeProtocol) {
		return nil, nil, fmt.Errorf("it switches to %q, want %s", resp.Header.Get("Upgrade"), upgradeProtocol)
	}
	limited.N = math.MaxInt64
	return NewStream(bufferedConn{conn, reader}), nil, nil
}

// bufferedConn reads first what came behind the head of a message.
type bufferedConn struct {
	net.Conn
	reader *bufio.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.reader.Read(p) }

// CloseWrite ends our direction where the connection can do that.
func (c bufferedConn) CloseWrite() error {
	if !endWriting(c.Conn) {
		return errors.ErrUnsupported
	}
	return nil
}

// hasToken looks for one word in a comma-separated header, as RFC 9110 compares.
func hasToken(header http.Header, name, token string) bool {
	for _, line := range header.Values(name) {
		for word := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(word), token) {
				return true
			}
		}
	}
	return false
}
