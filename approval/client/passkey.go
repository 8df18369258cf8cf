package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"cal/nucleus"
)

// NewPasskey begins the making of a passkey for an approver that is not there yet. Port is the
// page's; 0 is that of the passkeys that there are, or DefaultPort.
type NewPasskey struct {
	Name string `json:"name"`
	Port int    `json:"port,omitempty"`
}

// DefaultPort is where the authority's page is unless another port is named.
const DefaultPort = 7433

// Enrolment is a passkey that is being made. Who opens Link can make it, once, until then; it
// approves nothing before one who is there has vouched for it.
type Enrolment struct {
	ID    string `json:"id"`
	Link  string `json:"link"`
	Until int64  `json:"until_ms"`
}

// Made says that the passkey of an enrolment was made. The page is told its fingerprint alone; the
// terminal makes that from the key.
type Made struct {
	Fingerprint string `json:"fingerprint"` // empty: not yet
	Key         []byte `json:"public_key,omitempty"`
	Credential  []byte `json:"credential,omitempty"`
	Origin      string `json:"origin,omitempty"`
}

// Voucher is the word of one who can approve, and has a passphrase, for a passkey that was made.
type Voucher struct {
	By      string         `json:"by"`
	Vouched nucleus.Signed `json:"vouched"` // an authority.Identity, by the key of By
}

// Page is where the authority shows asks to a browser. Who has the link sees all asks and can
// deny them; to grant takes a passkey.
type Page struct {
	Link string `json:"link"`
}

// Enrol begins the making of a passkey, and opens the page if there was none.
func (c *Client) Enrol(ctx context.Context, n NewPasskey) (e Enrolment, err error) {
	return e, c.call(ctx, http.MethodPost, "/v1/passkeys", n, &e)
}

// Enrolled returns when the passkey was made, when its time is over, or with the error of ctx.
func (c *Client) Enrolled(ctx context.Context, id string) (made Made, err error) {
	path := "/v1/passkeys/" + url.PathEscape(id) + "?wait=" + strconv.Itoa(int(MaxWait/time.Second))
	for err == nil && made.Fingerprint == "" {
		err = c.callFor(ctx, MaxWait+callTimeout, http.MethodGet, path, nil, &made)
	}
	return made, err
}

// Vouch makes an approver of the passkey that was made.
func (c *Client) Vouch(ctx context.Context, id string, v Voucher) (made nucleus.Approver, err error) {
	return made, c.call(ctx, http.MethodPost, "/v1/passkeys/"+url.PathEscape(id)+"/voucher", v, &made)
}

// Page says where the page is, at an ask or, without one, at the list.
func (c *Client) Page(ctx context.Context, ask string) (p Page, err error) {
	return p, c.call(ctx, http.MethodGet, "/v1/page?ask="+url.QueryEscape(ask), nil, &p)
}
