package egress

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"cal/nucleus"
)

// fetchMethods are the methods of a fetch.
var fetchMethods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

// ownFields of a fetch's request are written by the gateway.
var ownFields = []string{"Host", "Content-Length", "Accept-Encoding"}

// fetchHeaders of a response are given to the agent.
var fetchHeaders = []string{
	"Content-Type", "Content-Language", "Content-Disposition", "Content-Range", "Last-Modified", "Etag", "Date",
	"Location", "Retry-After", "Link", "Allow", "Accept-Ranges", "X-Ratelimit-Remaining", "X-Ratelimit-Reset",
}

// NewFetch resolves the arguments of a fetch: the URL in its one spelling, the
// header names in theirs, the digest of the body. It refuses fields that the
// gateway sets itself or that speak to a proxy.
func NewFetch(method, rawURL string, headers map[string]string, body []byte) (nucleus.Fetch, error) {
	if method == "" {
		method = http.MethodGet
	}
	if !slices.Contains(fetchMethods, method) {
		return nucleus.Fetch{}, nucleus.Errorf(nucleus.KindInvalid, "method %.20q is not one of %s", method, strings.Join(fetchMethods, " "))
	}
	t, err := parseTarget(rawURL)
	if err != nil {
		return nucleus.Fetch{}, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	f := nucleus.Fetch{Method: method, URL: t.String(), Host: t.host, Port: t.port, Path: t.path}
	for name, value := range headers {
		canonical := http.CanonicalHeaderKey(name)
		_, twice := f.Headers[canonical]
		switch {
		case !isToken(name), !isFieldValue(value):
			return nucleus.Fetch{}, nucleus.Errorf(nucleus.KindInvalid, "header %.80q with value %.80q is not well formed", name, value)
		case slices.Contains(hopByHop, canonical), slices.Contains(ownFields, canonical):
			return nucleus.Fetch{}, nucleus.Errorf(nucleus.KindInvalid, "header %s is the gateway's to set", canonical)
		case twice:
			return nucleus.Fetch{}, nucleus.Errorf(nucleus.KindInvalid, "header %s is given twice", canonical)
		}
		if f.Headers == nil {
			f.Headers = map[string]string{}
		}
		f.Headers[canonical] = value
	}
	if len(body) > 0 {
		f.Body, f.Bytes = nucleus.SHA256(body), len(body)
	}
	return f, nil
}

// FetchResult is the answer to a fetch. Body holds at most the limit; Total is
// the length that the server stated, -1 where it stated none, and Cut says how
// much is missing, in words, where something is. A redirect is not followed: it
// is another place, and another decision. Redirect is where it points.
type FetchResult struct {
	Status   int               `json:"status"`
	Headers  map[string]string `json:"headers"`
	Body     []byte            `json:"body_b64"`
	Total    int64             `json:"total"`
	Cut      string            `json:"cut,omitempty"`
	Redirect string            `json:"redirect,omitempty"`
}

// Fetch makes exactly the request that f resolved to, or none. Errors are
// *nucleus.Error.
func (g *Gateway) Fetch(ctx context.Context, peer Peer, f nucleus.Fetch, body []byte) (*FetchResult, error) {
	result, refused := g.fetch(ctx, peer, f, body)
	if refused != nil {
		refused.Operation = nucleus.WebFetch
		return nil, refused.Error
	}
	return result, nil
}

func (g *Gateway) fetch(ctx context.Context, peer Peer, f nucleus.Fetch, body []byte) (*FetchResult, *refusal) {
	again, err := NewFetch(f.Method, f.URL, f.Headers, body)
	if err != nil {
		return nil, &refusal{nucleus.AsError(err), nil}
	}
	if len(f.Headers) == 0 {
		f.Headers = nil
	}
	if !reflect.DeepEqual(f, again) {
		return nil, refuse(nucleus.KindInvalid, "", "the fetch of %.200q is not in its resolved form, or its body is another", f.URL)
	}
	ctx, cancel := context.WithTimeout(ctx, g.limits.Fetch)
	defer cancel()
	p, refused := g.open(ctx, Attempt{
		Pod: peer.Pod, Session: peer.Session, Via: ViaFetch,
		Host: f.Host, Port: f.Port, Method: f.Method, URL: f.URL, Path: f.Path,
	})
	if refused != nil {
		return nil, refused
	}
	result, err := g.exchange(p, f, body)
	err = p.reason(err)
	p.end(err)
	if err != nil {
		return nil, failed(err, "fetching "+f.URL)
	}
	return result, nil
}

func (g *Gateway) exchange(p *crossing, f nucleus.Fetch, body []byte) (*FetchResult, error) {
	req, err := http.NewRequestWithContext(p.ctx, f.Method, f.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "CAL")
	for name, value := range f.Headers {
		req.Header.Set(name, value)
	}
	resp, err := p.transport(g).RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	result := &FetchResult{Status: resp.StatusCode, Headers: map[string]string{}, Total: resp.ContentLength}
	for _, name := range fetchHeaders {
		if values := resp.Header.Values(name); len(values) > 0 {
			result.Headers[name] = strings.Join(values, ", ")
		}
	}
	if location, err := resp.Location(); err == nil && resp.StatusCode/100 == 3 {
		result.Redirect = location.String()
	}
	return result, readCapped(result, resp.Body, g.limits.FetchBody)
}

// readCapped reads up to limit bytes and says what it left.
func readCapped(result *FetchResult, from io.Reader, limit int64) error {
	body, err := io.ReadAll(io.LimitReader(from, limit+1))
	if err != nil {
		return err
	}
	result.Body = body
	if int64(len(body)) <= limit {
		return nil
	}
	result.Body = body[:limit]
	result.Cut = fmt.Sprintf("cut after %d bytes, the total is not known", limit)
	if result.Total > limit {
		result.Cut = fmt.Sprintf("cut after %d of %d bytes", limit, result.Total)
	}
	return nil
}

// isToken reports whether s can name a field (RFC 9110, 5.6.2).
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || c > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c)
	})
}

// isFieldValue reports whether s is visible ASCII, spaces and tabs.
func isFieldValue(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' && c != '\t' || c > '~' })
}
