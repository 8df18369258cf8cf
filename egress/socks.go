package egress

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"cal/nucleus"
)

// Numbers of SOCKS5 (RFC 1928).
const (
	socksVersion  = 5
	socksNoAuth   = 0
	socksNoMethod = 0xff
	socksConnect  = 1

	socksIPv4 = 1
	socksName = 3
	socksIPv6 = 4

	replyDone               = 0
	replyFailure            = 1
	replyNotAllowed         = 2
	replyNetworkUnreachable = 3
	replyHostUnreachable    = 4
	replyRefused            = 5
	replyNoCommand          = 7
	replyNoAddressType      = 8
)

// ServeSOCKS serves one SOCKS5 connection of a guest: CONNECT without
// authentication, nothing else.
func (g *Gateway) ServeSOCKS(ctx context.Context, guest net.Conn, peer Peer) {
	defer guest.Close()
	guest.SetDeadline(time.Now().Add(g.limits.Handshake))
	leave := g.admit(peer.Pod)
	if leave == nil {
		_, _ = guest.Write([]byte{socksVersion, socksNoAuth}) // a guest that has gone needs no answer
		_ = writeReply(guest, replyFailure)
		return
	}
	defer leave()
	stop := context.AfterFunc(ctx, func() { guest.SetDeadline(past) })
	defer stop()

	from := bufio.NewReader(guest)
	host, port, err := readSOCKS(from, guest)
	if err != nil {
		g.refuseSOCKS(ctx, guest, peer, err)
		return
	}
	guest.SetDeadline(time.Time{})
	p, refused := g.open(ctx, Attempt{Pod: peer.Pod, Session: peer.Session, Stream: peer.Stream, Via: ViaSOCKS, Host: host, Port: port})
	guest.SetWriteDeadline(time.Now().Add(g.limits.Handshake))
	if refused != nil {
		_ = writeReply(guest, replyOf(refused))
		return
	}
	if err := writeReply(guest, replyDone); err != nil {
		p.end(err)
		return
	}
	guest.SetWriteDeadline(time.Time{})
	stop() // p ends with ctx too
	p.tunnel(guest, from)
}

// errSOCKS is a request that is answered with a reply instead of a connection.
type errSOCKS struct {
	reply byte
	error
}

func (g *Gateway) refuseSOCKS(ctx context.Context, guest net.Conn, peer Peer, err error) {
	var answer errSOCKS
	if !errors.As(err, &answer) {
		return // the guest went away, or speaks something else
	}
	_ = writeReply(guest, answer.reply)
	if answer.reply == replyNotAllowed {
		g.gate.Refused(ctx, malformed(peer, ViaSOCKS), refuse(nucleus.KindInvalid, ruleName, "%v", answer.error).Error)
	}
}

// malformed is an attempt whose host could not be read.
func malformed(peer Peer, via Via) Attempt {
	return Attempt{ID: nucleus.NewID("eg-"), Pod: peer.Pod, Session: peer.Session, Via: via}
}

// readSOCKS reads greeting and request, and answers the greeting.
func readSOCKS(r io.Reader, w io.Writer) (host string, port int, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return "", 0, err
	}
	if head[0] != socksVersion {
		return "", 0, fmt.Errorf("SOCKS version %d", head[0])
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(r, methods); err != nil {
		return "", 0, err
	}
	method := byte(socksNoMethod)
	for _, m := range methods {
		if m == socksNoAuth {
			method = socksNoAuth
		}
	}
	if _, err := w.Write([]byte{socksVersion, method}); err != nil {
		return "", 0, err
	}
	if method == socksNoMethod {
		return "", 0, errors.New("SOCKS client insists on authentication")
	}
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", 0, err
	}
	if head[0] != socksVersion || head[2] != 0 {
		return "", 0, errSOCKS{replyFailure, fmt.Errorf("SOCKS request % x", head)}
	}
	raw, err := readSOCKSHost(r, head[3])
	if err != nil {
		return "", 0, err
	}
	var number [2]byte
	if _, err := io.ReadFull(r, number[:]); err != nil {
		return "", 0, err
	}
	port = int(binary.BigEndian.Uint16(number[:]))
	if head[1] != socksConnect {
		return "", 0, errSOCKS{replyNoCommand, fmt.Errorf("SOCKS command %d", head[1])}
	}
	if host, err = ParseHost(raw); err != nil {
		return "", 0, errSOCKS{replyNotAllowed, err}
	}
	if port == 0 {
		return "", 0, errSOCKS{replyNotAllowed, fmt.Errorf("%s: port 0", host)}
	}
	return host, port, nil
}

func readSOCKSHost(r io.Reader, kind byte) (string, error) {
	var size [1]byte
	switch kind {
	case socksIPv4:
		size[0] = 4
	case socksIPv6:
		size[0] = 16
	case socksName:
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return "", err
		}
	default:
		return "", errSOCKS{replyNoAddressType, fmt.Errorf("SOCKS address type %d", kind)}
	}
	raw := make([]byte, size[0])
	if _, err := io.ReadFull(r, raw); err != nil {
		return "", err
	}
	if kind == socksName {
		return string(raw), nil
	}
	addr, _ := netip.AddrFromSlice(raw)
	return addr.String(), nil
}

// writeReply sends a reply without a bound address, which is nobody's business.
func writeReply(w io.Writer, reply byte) error {
	_, err := w.Write([]byte{socksVersion, reply, 0, socksIPv4, 0, 0, 0, 0, 0, 0})
	return err
}

func replyOf(r *refusal) byte {
	switch {
	case r.Kind == nucleus.KindDenied, r.Kind == nucleus.KindApproval, r.Kind == nucleus.KindRefused:
		return replyNotAllowed
	case r.Kind == nucleus.KindUnavailable:
		return replyFailure
	case errors.Is(r.cause, syscall.ECONNREFUSED):
		return replyRefused
	case errors.Is(r.cause, syscall.ENETUNREACH):
		return replyNetworkUnreachable
	}
	return replyHostUnreachable
}
