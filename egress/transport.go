package egress

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
)

// maxAnswerHead bounds the head of a response, in bytes.
const maxAnswerHead = 256 << 10

// transport sends one request over the crossing's connection and over no other.
func (p *crossing) transport(g *Gateway) *http.Transport {
	conn := make(chan net.Conn, 1)
	conn <- p.conn
	return &http.Transport{
		DisableKeepAlives:      true,
		DisableCompression:     p.Via != ViaFetch,
		MaxResponseHeaderBytes: maxAnswerHead,
		TLSHandshakeTimeout:    g.limits.Dial,
		TLSClientConfig:        &tls.Config{RootCAs: g.roots},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			select {
			case c := <-conn:
				return c, nil
			default:
				return nil, errors.New("a crossing has one connection")
			}
		},
	}
}
