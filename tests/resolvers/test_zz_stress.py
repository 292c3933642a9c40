import asyncio, os, random
import pytest
from modelharbor.errors import HarborError
from modelharbor.resolvers.completing import complete
from modelharbor.db.uploads import Segment
from modelharbor.resolvers import intake
from modelharbor.resolvers.uploads import *
from tests.resolvers.uploading import Site, body, site, digest_of
pytestmark = pytest.mark.anyio
@pytest.mark.parametrize("seed", [1,2,3])
async def test_stress(site, monkeypatch, seed):
    monkeypatch.setattr(intake, "FLUSH_BYTES", 100_000); monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02)
    rnd = random.Random(seed)
    receivers = [site.receiver(upload_lease_seconds=0.3) for _ in range(2)]
    errors = {}; rounds=[]
    async def one(i):
        data = rnd.randbytes(2_000_000)
        [row] = await site.create(UploadFile(f"s{i}", len(data), digest_of(data) if i % 2 else None))
        uid = row["_id"]
        async def feed(at):
            while at < len(data):
                n = rnd.randint(1, 30000); yield data[at:at+n]; at += n
                if rnd.random() < .2: await asyncio.sleep(rnd.random()*0.03)
                if rnd.random() < .05: raise ConnectionError
        for k in range(300):
            row = await site.row(uid)
            if not row["is_open"]: rounds.append(k); break
            if row["state"] == "RECEIVED":
                segs=[Segment(**e) for e in row["segments"]]; inc=site.storage.incoming; key=inc.final_key(segs)
                if key is None: key=f"incoming/{uid}/whole"; d=await inc.compose(segs,key)
                else: d=await inc.digest(key,len(data))
                await complete(site.database, site.storage, row, d, key); continue
            at = row["received_bytes"]
            tasks=[asyncio.create_task(rnd.choice(receivers).receive(site.viewer, uid, at, feed(at))) for _ in range(rnd.choice([1,1,3]))]
            if rnd.random()<.5:
                await asyncio.sleep(rnd.random()*0.2)
                rnd.choice(tasks).cancel()
            if rnd.random()<.3:
                await asyncio.sleep(rnd.random()*0.1)
                await site.database.data["uploads"].update_one({"_id":uid},{"$set":{"held_until":utc_now()-timedelta(seconds=1)}})
                now = (await site.row(uid))["received_bytes"]
                tasks.append(asyncio.create_task(rnd.choice(receivers).receive(site.viewer, uid, now, feed(now))))
            if rnd.random()<.1:
                try: await pause_upload(site.database, site.storage, site.viewer, upload_id=uid)
                except Refused: pass
            for r in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(r, BaseException):
                    errors[str(r)[:40] or type(r).__name__]=errors.get(str(r)[:40] or type(r).__name__,0)+1
                    if not isinstance(r,(HarborError,ConnectionError,asyncio.CancelledError)): raise r
        assert row["state"]=="COMPLETED", row
        assert row["sha256"]==digest_of(data)
        assert await site.contents(row["sha256"])==data
    await asyncio.gather(*(one(i) for i in range(16)))
    print("\n", errors, rounds, "kept", len(site.kept()), "quota", await site.quota(), await site.counters())
    keys={b["key"] async for b in site.database.data["blobs"].find()}
    print([k for k in site.kept() if "incoming/"+k not in keys])
