package authority

import (
	"context"
	"fmt"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// AddPasskey lets one who can approve add a passkey: it is made on the page, and the one who
// vouches compares its fingerprint before the passphrase is typed. So whoever else opened the
// link first has made a key that is not vouched for.
func (p *Prompt) AddPasskey(ctx context.Context, c *client.Client, by Key, n client.NewPasskey) (nucleus.Approver, error) {
	fail := func(err error) (nucleus.Approver, error) { return nucleus.Approver{}, err }
	begun, err := c.Enrol(ctx, n)
	if err != nil {
		return fail(err)
	}
	until := time.UnixMilli(begun.Until)
	if err := p.print("A passkey of approver %q is made in a browser of this host, until %s:\n\n  %s\n\n", n.Name, until.Format("15:04:05"), approval.Visible(begun.Link)); err != nil {
		return fail(err)
	}
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	made, err := c.Enrolled(waiting, begun.ID)
	if waiting.Err() != nil && ctx.Err() == nil {
		return fail(fmt.Errorf("%w: nobody made the passkey in time; begin again", ErrNotGranted))
	} else if err != nil {
		return fail(err)
	}
	if err := p.print("It is made, with fingerprint\n\n  %s\n\nThe page shows one too. Only if both are the same, go on: %s adds approver %q,\nwho can then grant alone what needs one approval.\nyour phrase: %s\n",
		fingerprint(made.Key), by.Approver, n.Name, approval.Visible(by.Phrase)); err != nil {
		return fail(err)
	}
	signer, err := p.open(by)
	if err != nil {
		return fail(err)
	}
	voucher, err := signer.VouchPasskey(n.Name, made)
	signer.Close()
	if err != nil {
		return fail(err)
	}
	approver, err := c.Vouch(ctx, begun.ID, voucher)
	if err != nil {
		return fail(err)
	}
	return approver, p.print("Approver %s has a passkey for %s (nucleus-authority page).\nIt can grant for machines that start from now on; those that run know it not.\n", approver.Name, approver.Origin)
}
