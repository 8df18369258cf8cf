package egress

import (
	"bufio"
	"io"
	"math"
	"net/http"
)

// ReadAlong reads what a program sends to ServeSOCKS or ServeProxy, by the same
// parsers, and calls asked with each place that it asks for, in their order. It
// is for whoever carries the connection and has to know, beside the gateway, where
// it leads. It returns at the end of r, at what it cannot read, and where nothing
// more can come: the bytes of a tunnel are nobody's business.
func ReadAlong(r io.Reader, via Via, asked func(host string, port int)) error {
	if via == ViaSOCKS {
		host, port, err := readSOCKS(r, io.Discard)
		if err == nil {
			asked(host, port)
		}
		return err
	}
	limited := &io.LimitedReader{R: r}
	from := bufio.NewReader(limited)
	for {
		limited.N = maxAlong
		req, err := http.ReadRequest(from)
		if err != nil {
			return err
		}
		limited.N = math.MaxInt64 // the body is read and kept nowhere
		if req.Method == http.MethodConnect {
			host, port, err := connectTarget(req)
			if err == nil {
				asked(host, port)
			}
			return err
		}
		t, err := forwardTarget(req)
		if err != nil {
			return err
		}
		asked(t.host, t.port)
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return err
		}
	}
}

const maxAlong = 64 << 10 // bytes of a request's head
