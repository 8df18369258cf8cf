package authority

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// The page shows asks to a browser on this host, and grants by passkey. The threat is everybody
// else who can reach a port of the loopback: pages of other sites in the same browser, by their
// own names or by a name that they point here, other users of the host, and programs of the same
// user. So a request must come from this origin and no other, as the browser says and no script
// can change; what it reads takes a key that only the daemon's own user is told; and a grant
// takes a signature that none of these can make. Who has the link can look, and can deny.

// page is the listener of one port of the loopback.
type page struct {
	a      *Authority
	origin string
	host   string
	key    string // whoever has it may look; new at every start
	server *http.Server
	stop   context.CancelFunc
	served sync.WaitGroup
}

const (
	pageKeyHeader  = "Nucleus-Page"
	pagePatience   = 25 * time.Second // of a request that waits for a change
	maxColumns     = 160
	securityPolicy = "default-src 'none'; script-src '%s'; style-src '%s'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
	permissions    = "publickey-credentials-create=(self), publickey-credentials-get=(self), accelerometer=(), camera=(), clipboard-read=(), display-capture=(), geolocation=(), gyroscope=(), hid=(), microphone=(), midi=(), payment=(), serial=(), usb=()"
)

var (
	//go:embed page.html
	pageHTML string
	//go:embed page.css
	pageCSS string
	//go:embed page.js
	pageJS string
)

// pageText is the page and the policy that lets its own script and style through, and nothing else.
var pageText, pagePolicy = func() ([]byte, string) {
	var out bytes.Buffer
	err := template.Must(template.New("page").Parse(pageHTML)).Execute(&out, struct {
		CSS template.CSS
		JS  template.JS
	}{template.CSS(pageCSS), template.JS(pageJS)})
	if err != nil {
		panic(err) // it is a file of this package
	}
	return out.Bytes(), fmt.Sprintf(securityPolicy, sourceHash(pageJS), sourceHash(pageCSS))
}()

func sourceHash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

func portOf(origin string) int {
	port, _ := strconv.Atoi(origin[strings.LastIndexByte(origin, ':')+1:])
	return port
}

// servePasskeys opens the page where there are passkeys. Without it the terminal still works.
func (a *Authority) servePasskeys() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if origin := a.pageOrigin(); origin != "" {
		if err := a.openPage(portOf(origin)); err != nil {
			slog.Warn("no passkey can approve", "error", err)
		}
	}
}

// openPage listens on a port of the loopback, of both kinds where the host has both: what
// "localhost" means must not be somebody else. The caller holds mu.
func (a *Authority) openPage(port int) error {
	origin := approval.Origin(port)
	if p := a.passkeys.page; p != nil {
		if p.origin == origin {
			return nil
		}
		return nucleus.Errorf(nucleus.KindConflict, "the page is at %s; another port takes a new start of the daemon", p.origin)
	}
	if port < 1024 || port > 65535 {
		return nucleus.Errorf(nucleus.KindInvalid, "port %d, want 1024 to 65535", port)
	}
	var listeners []net.Listener
	for _, host := range []string{"127.0.0.1", "::1"} {
		listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if host == "::1" && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
			continue // this host speaks no IPv6
		}
		if err != nil {
			for _, l := range listeners {
				err = errors.Join(err, l.Close())
			}
			return nucleus.Errorf(nucleus.KindUnavailable, "the page cannot be at %s: %v", origin, err)
		}
		listeners = append(listeners, listener)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &page{a: a, origin: origin, host: strings.TrimPrefix(origin, "http://"), key: base64.RawURLEncoding.EncodeToString(randomBytes()), stop: stop}
	p.server = &http.Server{
		Handler:           p.handler(),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      pagePatience + 30*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	for _, l := range listeners {
		p.served.Go(func() {
			if err := p.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				slog.Error("the page ended", "origin", origin, "error", err)
			}
		})
	}
	a.passkeys.page = p
	return nil
}

// closePage ends the page, and returns when its last request has ended.
func (a *Authority) closePage() {
	a.mu.Lock()
	p := a.passkeys.page
	a.passkeys.page = nil
	a.mu.Unlock()
	if p == nil {
		return
	}
	p.stop() // those who wait for a change are answered
	last, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.server.Shutdown(last); err != nil {
		slog.Warn("the page was cut off", "error", errors.Join(err, p.server.Close()))
	}
	p.served.Wait()
}

// pageLink is where a person looks at an ask, or at all.
func (a *Authority) pageLink(ask string) (client.Page, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.passkeys.page
	if p == nil {
		return client.Page{}, nucleus.Errorf(nucleus.KindUnavailable, "there is no page: nobody has a passkey (nucleus-authority approver add NAME --passkey), or its port was taken at the start")
	}
	link := p.origin + "/#key=" + p.key
	if ask != "" {
		link += "&ask=" + url.QueryEscape(ask)
	}
	return client.Page{Link: link}, nil
}

func (p *page) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(pageText) // a peer that went away asks again
	})
	// open is for who has the link of an enrolment, which is in the body; see is for who has the
	// page's key.
	open := func(pattern string, serve func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			reply, err := serve(r)
			answer(w, reply, err)
		})
	}
	see := func(pattern string, serve func(*http.Request) (any, error)) {
		open(pattern, func(r *http.Request) (any, error) {
			if subtle.ConstantTimeCompare([]byte(r.Header.Get(pageKeyHeader)), []byte(p.key)) != 1 {
				return nil, nucleus.Errorf(nucleus.KindUnauthenticated, "this takes the link that the daemon's own user is given: nucleus-authority page")
			}
			return serve(r)
		})
	}
	see("GET /api/asks", p.asks)
	see("GET /api/asks/{id}", p.ask)
	see("POST /api/asks/{id}/challenge", func(r *http.Request) (any, error) {
		var d pageDecision
		if err := read(r, maxBody, &d); err != nil {
			return nil, err
		}
		challenge, credential, err := p.a.challenge(r.PathValue("id"), decision{grant: true, approver: d.Approver, digest: d.AskDigest, reason: d.Reason})
		return pageChallenge{Challenge: challenge, Credential: credential, Party: approval.RelyingParty}, err
	})
	see("POST /api/asks/{id}/grant", func(r *http.Request) (any, error) {
		var s pageSignature
		if err := read(r, maxBody, &s); err != nil {
			return nil, err
		}
		status, err := p.a.grantByPasskey(r.PathValue("id"), base64.RawURLEncoding.EncodeToString(s.Challenge), s.Answer)
		return withoutTokens(status), err
	})
	see("POST /api/asks/{id}/denial", func(r *http.Request) (any, error) {
		var d pageDecision
		if err := read(r, maxBody, &d); err != nil {
			return nil, err
		}
		status, err := p.a.Deny(r.PathValue("id"), client.Denial(d))
		return withoutTokens(status), err
	})
	open("POST /api/enrolment", func(r *http.Request) (any, error) {
		var e pageEnrolment
		if err := read(r, maxBody, &e); err != nil {
			return nil, err
		}
		return p.a.enrolling(e.Enrolment)
	})
	open("POST /api/enrolment/passkey", func(r *http.Request) (any, error) {
		var e pageEnrolment
		if err := read(r, maxBody, &e); err != nil {
			return nil, err
		}
		return p.a.register(e.Enrolment, e.Registration)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, nucleus.Errorf(nucleus.KindNotFound, "there is no %s %s", r.Method, r.URL.Path))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range map[string]string{
			"Content-Security-Policy": pagePolicy, "Permissions-Policy": permissions, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
			"X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
			"Cross-Origin-Embedder-Policy": "require-corp", "Cache-Control": "no-store",
		} {
			w.Header().Set(name, value)
		}
		if err := p.foreign(r); err != nil {
			answer(w, nil, err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// foreign refuses a request that this page's own script did not make. A browser says where a
// request comes from in headers that no script can set (Fetch, 4.6; Fetch Metadata); a name that
// was pointed here by somebody else stands in Host.
func (p *page) foreign(r *http.Request) error {
	refuse := func(format string, args ...any) error { return nucleus.Errorf(nucleus.KindForbidden, format, args...) }
	if r.Host != p.host {
		return refuse("this is %s, not %q", p.host, r.Host)
	}
	origins, metadata := r.Header.Values("Origin"), r.Header.Get
	foreignOrigin := len(origins) > 1 || len(origins) == 1 && origins[0] != p.origin
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodPost:
		return refuse("%s is not used here", r.Method)
	case foreignOrigin, r.Method == http.MethodPost && len(origins) == 0:
		return refuse("a request of %q, not of %s", origins, p.origin)
	case r.Method == http.MethodPost && r.Header.Get("Content-Type") != "application/json":
		return refuse("a body of type %q, want application/json", r.Header.Get("Content-Type"))
	case r.URL.Path == "/":
		// The page itself, which tells nothing, may be come to from anywhere, but not put inside anything.
		if d, m := metadata("Sec-Fetch-Dest"), metadata("Sec-Fetch-Mode"); d != "" && d != "document" || m != "" && m != "navigate" {
			return refuse("the page is opened in a window of its own, not by %q as %q", m, d)
		}
	case metadata("Sec-Fetch-Site") != "same-origin":
		return refuse("a request from %q, want same-origin", metadata("Sec-Fetch-Site"))
	}
	return nil
}

// pageDecision is what a person decides at the page about what has the digest.
type pageDecision client.Denial

type pageChallenge struct {
	Challenge  []byte `json:"challenge"`
	Credential []byte `json:"credential"`
	Party      string `json:"rp_id"`
}

type pageSignature struct {
	Challenge []byte `json:"challenge"`
	approval.Answer
}

type pageEnrolment struct {
	Enrolment string `json:"enrolment"`
	approval.Registration
}

// pageAsks is the list. State changes whenever the rest does.
type pageAsks struct {
	State     string        `json:"state"`
	Asks      []client.Item `json:"asks"`
	Approvers []string      `json:"approvers"` // who have a passkey
}

// asks answers with what is pending, once it is different from what the page knows.
func (p *page) asks(r *http.Request) (any, error) {
	known := r.URL.Query().Get("known")
	patience := time.NewTimer(pagePatience)
	defer patience.Stop()
	for waiting := true; ; {
		list, changed, err := p.list()
		if err != nil || list.State != known || !waiting {
			return list, err
		}
		next := pagePatience
		for _, i := range list.Asks {
			next = min(next, time.Duration(i.Expires-p.a.millis())*time.Millisecond)
		}
		expiry := time.NewTimer(next)
		select {
		case <-changed:
		case <-expiry.C:
		case <-patience.C:
			waiting = false
		case <-r.Context().Done():
			waiting = false
		}
		expiry.Stop()
	}
}

func (p *page) list() (list pageAsks, changed <-chan struct{}, err error) {
	p.a.mu.Lock()
	changed = p.a.changed
	list.Approvers = []string{}
	for _, f := range p.a.files {
		if f.Kind == nucleus.ApproverPasskey && f.Removed == 0 && f.Origin == p.origin {
			list.Approvers = append(list.Approvers, f.Approver)
		}
	}
	p.a.mu.Unlock()
	if list.Asks, err = p.a.store.list(client.Pending, client.MaxListed, p.a.millis()); err != nil {
		return list, nil, err
	}
	raw, err := nucleus.Canonical(list)
	list.State = nucleus.SHA256(raw)
	return list, changed, err
}

// pageAsk is one ask as approval.Draw shows it.
type pageAsk struct {
	client.Status
	Summary string `json:"summary"`
	Pod     string `json:"pod"`
	Text    string `json:"text"`
	Cut     bool   `json:"cut"`
	Passage bool   `json:"passage"` // a grant opens one
	Expires int64  `json:"expires_ms"`
}

func (p *page) ask(r *http.Request) (any, error) {
	whole := r.URL.Query().Get("whole") == "true"
	columns, err := strconv.Atoi(r.URL.Query().Get("columns"))
	if err != nil || columns < 40 || columns > maxColumns {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "columns=%q, want 40 to %d", r.URL.Query().Get("columns"), maxColumns)
	}
	p.a.mu.Lock()
	row, ask, err := p.a.known(r.PathValue("id"))
	p.a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	screen, err := approval.Draw(ask, approval.View{Width: columns, Whole: whole})
	if err != nil {
		return nil, err
	}
	if screen.Digest != row.digest {
		return nil, fmt.Errorf("ask %s: drawn from %s, kept as %s", row.id, screen.Digest, row.digest)
	}
	return pageAsk{withoutTokens(row.status(p.a.millis())), row.summary, row.pod, screen.Text, screen.Cut, ask.Passage != nil, row.expires}, nil
}

// withoutTokens is what a page is told: it has no use for a token.
func withoutTokens(s client.Status) client.Status {
	for i := range s.Grants {
		s.Grants[i].Token = ""
	}
	return s
}

// pageEnrolling is what a browser makes a passkey with.
type pageEnrolling struct {
	Name      string   `json:"name"`
	User      []byte   `json:"user"` // the id of the user that the authenticator is told
	Party     string   `json:"rp_id"`
	Challenge []byte   `json:"challenge"`
	Known     [][]byte `json:"known"` // credentials that are here already
	Host      string   `json:"host"`
}

func (a *Authority) enrolling(id string) (pageEnrolling, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e, err := a.enrolmentOf(id)
	if err != nil {
		return pageEnrolling{}, err
	}
	host, _ := os.Hostname()
	sum := sha256.Sum256([]byte(e.id))
	on := pageEnrolling{Name: e.name, User: sum[:16], Party: approval.RelyingParty, Challenge: e.challenge, Known: [][]byte{}, Host: host}
	for _, f := range a.files {
		if f.Kind == nucleus.ApproverPasskey {
			on.Known = append(on.Known, f.Credential)
		}
	}
	return on, nil
}
